"""Memory that two processes of one machine have both: what is in it, whose it is, and what stays of it."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from actors.errors import RunFailure
from actors.sync import shared_memory
from actors.sync.channel import Channel, Connector, Listener
from actors.sync.protocol import Offer, StageAck, decide
from actors.sync.relay_tree import TOP
from actors.sync.shared_memory import DeviceMemory, HostMemory
from actors.sync.spec import Backend, backends_for
from tests.actors.sync.test_channel import connected, payload, sent


def open_windows() -> list[str]:
    """Windows that this process has open or mapped."""
    files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _there(name)]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in [*files, *maps] if "raylign-window" in line]


def _there(descriptor: str) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_symlink()


@pytest.mark.parametrize(
    ("gpus", "one_device", "first", "others"),
    [
        ((0, 0), False, "gloo", "gloo"),
        ((1, 1), False, "nccl", "nccl"),
        ((1, 0), False, "gloo", "gloo"),
        ((0, 0), True, "shared", "gloo"),
        ((1, 1), True, "ipc", "nccl"),
    ],
)
def test_only_the_engine_on_the_first_ranks_device_has_memory_in_common_with_it(
    gpus: tuple[int, int], one_device: bool, first: Backend, others: Backend
) -> None:
    backends = backends_for(*gpus, one_device)
    assert (backends.of(0, TOP), backends.of(1, TOP)) == (first, others)
    # What an engine passes on goes to another device.
    assert (backends.of(0, 1), backends.of(1, 0)) == (others, others)


def test_a_window_is_kept_for_smaller_chunks_and_gone_with_the_channel() -> None:
    trainer, engine = connected(backend="shared")
    sent(trainer, engine, payload(5000), payload(10), payload(4000))
    # A map an end, and the descriptor that Python's map keeps.
    assert len(open_windows()) == 2 * 2
    trainer.close()
    engine.close()
    assert open_windows() == []


def test_a_byte_that_is_changed_in_the_window_is_found_by_the_digest() -> None:
    trainer, engine = connected(backend="shared")
    whole = payload(1000)

    def spoil(memory: HostMemory, size: int, handle: bytes, descriptors: list[int]) -> object:
        window = opened(memory, size, handle, descriptors)
        if size == whole.buffer.numel():
            window.tensor[17] ^= 1
        return window

    opened = HostMemory.open
    with mock.patch.object(HostMemory, "open", spoil):
        (arrived,) = sent(trainer, engine, whole)
    offer = Offer(1, len(whole.buffer), 1, whole.digest, whole.manifest.digest)
    acknowledged = StageAck(1, len(arrived.buffer), 1, arrived.digest, arrived.manifest.digest)
    decision = decide(offer, {0: acknowledged})
    assert not decision.commit
    assert "acknowledged digest" in decision.refusals[0]


def test_a_chunk_of_another_size_than_expected_is_refused() -> None:
    trainer, engine = connected(backend="shared")
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(trainer._move, torch.zeros(8, dtype=torch.uint8), "send")
        with pytest.raises(RunFailure, match="8 bytes came, 16 were expected"):
            engine._guarded(lambda: engine._move(torch.zeros(16, dtype=torch.uint8), "recv"), "recv")
        with pytest.raises(RuntimeError, match="closed by peer"):
            sending.result()


def test_another_users_process_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    users = iter([os.getuid() + 1, os.getuid()])
    monkeypatch.setattr(shared_memory, "_user_of", lambda connection: next(users))
    listener = Listener("127.0.0.1", 5.0)
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(listener.accept, "engine 0", "shared")
        stranger = Connector(listener.address, 5.0).join("shared")
        engine = Connector(listener.address, 5.0).join("shared")
        trainer = accepting.result()
    assert len(sent(trainer, engine, payload())) == 1
    with pytest.raises(RunFailure, match="the other end is gone"):
        stranger.receive()


def test_the_user_at_the_other_end_is_known_from_the_kernel() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        assert shared_memory._user_of(one) == os.getuid()


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA's handles in one process of a machine without a GPU: a handle is a number in a table."""
    memory = list[torch.Tensor]()

    def reduced(tensor: torch.Tensor) -> tuple[object, tuple[int]]:
        memory.append(tensor)
        return _of_table, (len(memory) - 1,)

    monkeypatch.setattr(shared_memory, "reduce_tensor", reduced)
    monkeypatch.setattr(DeviceMemory, "settle", lambda self: None)
    monkeypatch.setattr(DeviceMemory, "__init__", lambda self: setattr(self, "device", torch.device("cpu")))
    TABLE.append(memory)
    yield
    TABLE.clear()


TABLE: list[list[torch.Tensor]] = []


def _of_table(number: int) -> torch.Tensor:
    return TABLE[0][number]


def test_device_memory_goes_by_handles(pretended_device: None) -> None:
    trainer, engine = connected(backend="ipc")
    for numbers in (0, 10, 5000, 20):
        (arrived,) = sent(trainer, engine, payload(numbers))
        assert arrived.digest == payload(numbers).digest
    assert pickle.loads(DeviceMemory().make(4)[1])[0] is _of_table


@pytest.mark.gpu
def test_on_a_real_gpu_two_processes_have_the_same_memory() -> None:
    import multiprocessing

    listener = Listener("127.0.0.1", 60.0)
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    peer = context.Process(target=_receive_on_gpu, args=(listener.address, answers), daemon=True)
    peer.start()
    trainer: Channel = listener.accept("engine 0", "ipc")
    for numbers in (1000, 0, 5_000_000):
        trainer.send(payload(numbers))
        assert answers.get() == (payload(numbers).digest, "cuda")
    peer.join(30)


def _receive_on_gpu(address: str, answers: object) -> None:
    channel = Connector(address, 60.0).join("ipc")
    for _ in range(3):
        arrived = channel.receive()
        answers.put((arrived.digest, arrived.buffer.device.type))  # type: ignore[attr-defined]

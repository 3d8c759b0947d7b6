"""A connection of two, over real gloo and shared memory: payloads arrive whole, and nobody waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from actors.errors import RunFailure
from actors.sync import channel, transport
from actors.sync.channel import CHUNK_BYTES, Channel, Connector, Listener
from actors.sync.payload import Payload, pack_merged
from actors.sync.spec import Backend

TIMEOUT_S = 5.0
on_cpus = pytest.mark.parametrize("backend", ["gloo", "shared"])


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def connected(timeout_s: float = TIMEOUT_S, backend: Backend = "gloo") -> tuple[Channel, Channel]:
    listener = Listener("127.0.0.1", timeout_s)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(lambda: Connector(listener.address, timeout_s).join(backend))
        trainer = listener.accept("engine 0", backend)
        return trainer, joining.result()


def payload(size: int = 1000, version: int = 1) -> Payload:
    return pack_merged(version, "float32", {"layer.weight": torch.arange(size, dtype=torch.float32)})


def sent(trainer: Channel, engine: Channel, *payloads: Payload) -> list[Payload]:
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(lambda: [engine.receive() for _ in payloads])
        for one in payloads:
            trainer.send(one)
        return receiving.result()


@on_cpus
def test_payloads_arrive_byte_for_byte_one_after_the_other(backend: Backend) -> None:
    trainer, engine = connected(backend=backend)
    one, two = payload(), payload(10, version=2)
    first, second = sent(trainer, engine, one, two)
    assert (first.manifest, first.digest) == (one.manifest, one.digest)
    assert (second.manifest, second.digest) == (two.manifest, two.digest)


def test_each_end_is_told_on_what_device_the_others_weights_are() -> None:
    listener = Listener("127.0.0.1", TIMEOUT_S)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(lambda: Connector(listener.address, TIMEOUT_S).join(device="cuda"))
        trainer = listener.accept("engine 0")
        assert (trainer.peer_device, joining.result().peer_device) == ("cuda", "cpu")


@on_cpus
@pytest.mark.parametrize("numbers", [0, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 17])
def test_nothing_a_chunk_and_more_arrive_whole(backend: Backend, numbers: int) -> None:
    big = payload(numbers)
    (arrived,) = sent(*connected(backend=backend), big)
    assert torch.equal(arrived.buffer, big.buffer)
    assert arrived.digest == big.digest


@on_cpus
def test_several_engines_have_channels_that_know_nothing_of_each_other(backend: Backend) -> None:
    pairs = [connected(backend=backend) for _ in range(3)]
    pairs[1][1].close()
    for trainer, engine in (pairs[0], pairs[2]):
        assert len(sent(trainer, engine, payload())) == 1


def test_nobody_listening_is_said_within_the_deadline() -> None:
    listener = Listener("127.0.0.1", 0.3)
    address = listener.address
    del listener
    began = time.monotonic()
    with pytest.raises(RunFailure, match="nobody listens at 127"):
        Connector(address, 0.3)
    assert time.monotonic() - began < 10


@on_cpus
def test_an_engine_that_never_comes_is_said_within_the_deadline(backend: Backend) -> None:
    began = time.monotonic()
    with pytest.raises(RunFailure, match=r"channel to engine 3 failed in phase 'sync': connect failed"):
        Listener("127.0.0.1", 0.3).accept("engine 3", backend)
    assert time.monotonic() - began < 10


def test_an_engine_that_dies_between_knocking_and_joining_costs_little_whatever_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "JOIN_S", 0.3)
    listener = Listener("127.0.0.1", 600.0)
    Connector(listener.address, 600.0)
    began = time.monotonic()
    with pytest.raises(RunFailure, match="connect failed"):
        listener.accept("engine 0")
    assert time.monotonic() - began < 10


def test_a_payload_may_take_longer_than_the_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "JOIN_S", 0.3)
    trainer, engine = connected()
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(trainer.send, payload())
        time.sleep(0.6)
        assert engine.receive().digest == payload().digest
        sending.result()


@on_cpus
@pytest.mark.parametrize("operation", ["send", "receive"])
def test_a_peer_that_does_nothing_costs_the_deadline_and_the_channel(
    operation: str, backend: Backend
) -> None:
    trainer, engine = connected(0.3, backend)
    work: Callable[[], object] = (lambda: trainer.send(payload())) if operation == "send" else engine.receive
    began = time.monotonic()
    with pytest.raises(RunFailure, match="no answer within the deadline"):
        work()
    assert 0.2 < time.monotonic() - began < 5
    with pytest.raises(RunFailure, match="it is closed"):
        work()


@on_cpus
def test_a_peer_that_is_killed_between_two_chunks_is_noticed_at_once_and_leaves_nothing(
    backend: Backend,
) -> None:
    before = set(os.listdir("/dev/shm"))
    listener = Listener("127.0.0.1", 60.0)
    context = multiprocessing.get_context("spawn")
    peer = context.Process(target=take_the_header_and_die, args=(listener.address, backend), daemon=True)
    peer.start()
    trainer = listener.accept("engine 0", backend)
    began = time.monotonic()
    with pytest.raises(RunFailure, match="send failed: the other end is gone"):
        trainer.send(payload(CHUNK_BYTES))
    assert time.monotonic() - began < 20
    peer.join(10)
    # Other tests of this machine may come and go there, under other names.
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "raylign" in name]


def take_the_header_and_die(address: str, backend: Backend) -> None:
    joined = Connector(address, 60.0).join(backend)
    threading.Timer(0.5, os._exit, (9,)).start()
    joined._move(torch.empty(2, dtype=torch.int64), "recv")
    time.sleep(60)


class HungGroup:
    """An NCCL group whose peer died: operations never complete, and nothing is raised."""

    aborted: ClassVar[list[HungGroup]] = []
    watchdog: ClassVar[str | None] = None
    abort_s: ClassVar[float] = 0.0

    class Options:
        """torch's."""

    def __init__(self, *args: object) -> None:
        type(self).watchdog = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")

    def send(self, *args: object) -> mock.Mock:
        return mock.Mock(is_completed=mock.Mock(return_value=False))

    def recv(self, *args: object) -> mock.Mock:
        return self.send(*args)

    def abort(self) -> None:
        self.aborted.append(self)
        time.sleep(self.abort_s)


class WaitingGroup(HungGroup):
    """One whose peer died before the first operation, which makes the connection and does not return."""

    def send(self, *args: object) -> mock.Mock:
        time.sleep(60)
        raise AssertionError("it was waited for")


class RefusingGroup(HungGroup):
    """One of two processes on the same GPU, in torch's and NCCL's words."""

    def send(self, *args: object) -> mock.Mock:
        raise RuntimeError(
            "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage, NCCL version 2.29.7\n"
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
            "Last error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 50000"
        )


@pytest.fixture
def nccl_groups(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[HungGroup]], None]:
    """Puts a class in the place of torch's group over NCCL."""

    def use(group: type[HungGroup]) -> None:
        monkeypatch.setattr(dist, "ProcessGroupNCCL", group, raising=False)
        monkeypatch.setitem(transport.DEVICES, "nccl", "cpu")
        monkeypatch.setattr(group, "aborted", [])

    return use


def trainer_over_nccl(timeout_s: float) -> Channel:
    listener = Listener("127.0.0.1", timeout_s)
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(lambda: Connector(listener.address, TIMEOUT_S).join("nccl"))
        trainer = listener.accept("engine 0", "nccl")
        engine.result()
    return trainer


def test_over_nccl_an_engine_that_never_comes_costs_the_meeting(
    nccl_groups: Callable[[type[HungGroup]], None],
) -> None:
    nccl_groups(HungGroup)
    listener = Listener("127.0.0.1", 0.3)
    began = time.monotonic()
    with pytest.raises(RunFailure, match="connect failed: no answer within the deadline"):
        listener.accept("engine 0", "nccl")
    assert time.monotonic() - began < 5


def test_a_first_operation_over_nccl_that_never_returns_is_left_behind(
    nccl_groups: Callable[[type[HungGroup]], None],
) -> None:
    nccl_groups(WaitingGroup)
    trainer = trainer_over_nccl(0.3)
    began = time.monotonic()
    with pytest.raises(RunFailure, match="send failed: no answer within the deadline"):
        trainer.send(payload())
    assert time.monotonic() - began < 5
    assert len(WaitingGroup.aborted) == 1


def test_two_processes_on_one_gpu_are_told_in_nccls_words(
    nccl_groups: Callable[[type[HungGroup]], None],
) -> None:
    nccl_groups(RefusingGroup)
    with pytest.raises(RunFailure, match="send failed: Duplicate GPU detected : rank 0 and rank 1"):
        trainer_over_nccl(TIMEOUT_S).send(payload())


@pytest.mark.gpu
def test_over_real_nccl_an_engine_that_never_comes_costs_the_deadline_and_the_gpu_goes_on() -> None:
    listener = Listener("127.0.0.1", 2.0)
    began = time.monotonic()
    with pytest.raises(RunFailure, match="no answer within the deadline"):
        listener.accept("engine 0", "nccl").send(payload())
    assert time.monotonic() - began < 20
    assert torch.ones(2, device="cuda").sum() == 2


@pytest.mark.parametrize("abort_s", [0.0, 60.0], ids=["abort returns", "abort hangs as well"])
def test_an_operation_that_hangs_is_aborted_at_its_deadline_and_the_process_lives(
    monkeypatch: pytest.MonkeyPatch, nccl_groups: Callable[[type[HungGroup]], None], abort_s: float
) -> None:
    nccl_groups(HungGroup)
    monkeypatch.setattr(HungGroup, "abort_s", abort_s)
    monkeypatch.setattr(transport, "ABORT_S", 0.2)
    before = dict(os.environ)
    trainer = trainer_over_nccl(0.3)
    # torch's watchdog would end this process; it is off for this group, and for no other.
    assert HungGroup.watchdog == "0"
    assert dict(os.environ) == before
    began = time.monotonic()
    with pytest.raises(RunFailure, match="engine 0 failed in phase 'sync': send failed: no answer within"):
        trainer.send(payload())
    assert time.monotonic() - began < 5
    assert len(HungGroup.aborted) == 1
    with pytest.raises(RunFailure, match="closed"):
        trainer.send(payload())

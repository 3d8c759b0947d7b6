"""Transports of a channel of two: gloo between CPUs, NCCL between GPUs, the memory that both have where they
take turns on one device; with one behaviour.

An operation ends, or raises RuntimeError within its deadline, whatever the other end does, and whoever gives
up lives on. gloo does so by itself. NCCL's first operation does not return before the peer has come to it;
later ones only queue on a stream, a dead peer leaves their kernel spinning, and torch's watchdog then ends
the whole process: a policy's, in the middle of a run. So both ends meet at the store first, the first
operation is begun by a thread that can be left behind, completion is asked for here, and what does not
complete is aborted here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from actors.sync.shared_memory import DeviceMemory, HostMemory, SharedMemory
from actors.sync.spec import Backend
from actors.variables import variables_set

Operation = Literal["send", "recv"]
DEVICES = {"gloo": "cpu", "nccl": "cuda", "shared": "cpu", "ipc": "cuda"}
"""Place of the tensors that a backend carries."""
ABORT_S = 10.0
"""Longest wait for an abort. One that hangs is left to itself: the group is not used again."""
ASK_EVERY_S = 1e-4
"""Pause between two questions for completion: 64 MiB take 1.5 ms at 40 GB/s."""
WATCHDOG_OFF = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""torch reads these when a group is made: its watchdog tears no process down for this group."""


class Transport(Protocol):
    """Operations between the two ranks of a group."""

    device: torch.device

    def move(self, chunk: torch.Tensor, operation: Operation, peer: int) -> None:
        """Send a tensor, or receive into it.

        Raises:
            RuntimeError: the peer is gone, or did not take part within the deadline.
        """

    def close(self) -> None:
        """Give the connection up; safe after an error, and a second time."""


def transport(backend: Backend, store: Any, rank: int, timeout: timedelta, joining: timedelta) -> Transport:
    """One end. `timeout`: of every operation; `joining`: of the meeting with the other end.

    Raises:
        RuntimeError: the other end did not come.
    """
    if backend in ("shared", "ipc"):
        memory = HostMemory() if backend == "shared" else DeviceMemory()
        return SharedMemory(memory, store, rank, timeout, joining)
    return (_Gloo if backend == "gloo" else _Nccl)(store, rank, timeout, joining)


class _Gloo:
    def __init__(self, store: Any, rank: int, timeout: timedelta, joining: timedelta) -> None:
        self.device = torch.device(DEVICES["gloo"])
        self._timeout = timeout
        self._group: Any = dist.ProcessGroupGloo(store, rank, 2, joining)

    def move(self, chunk: torch.Tensor, operation: Operation, peer: int) -> None:
        getattr(self._group, operation)([chunk], peer, 0).wait(self._timeout)

    def close(self) -> None:
        self._group = None


class _Nccl:
    def __init__(self, store: Any, rank: int, timeout: timedelta, joining: timedelta) -> None:
        self.device = torch.device(DEVICES["nccl"])
        self._timeout = timeout.total_seconds()
        self._begun = False
        _meet(store, rank, joining)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        with variables_set(WATCHDOG_OFF):
            self._group: Any = dist.ProcessGroupNCCL(store, rank, 2, options)

    def move(self, chunk: torch.Tensor, operation: Operation, peer: int) -> None:
        until = time.monotonic() + self._timeout
        begin = partial(getattr(self._group, operation), [chunk], peer, 0)
        work = begin() if self._begun else _left_behind_after(self._timeout, begin, chunk)
        self._begun = True
        # Raises what NCCL has found out about the peer.
        while not work.is_completed():
            if time.monotonic() > until:
                raise RuntimeError(f"timeout: {operation} did not complete within {self._timeout:g} s")
            time.sleep(ASK_EVERY_S)
        # The stream on which the tensor is used waits for NCCL's.
        work.wait()

    def close(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        # Without it the group's end waits for its kernels, which wait for the peer.
        aborting = threading.Thread(target=_abort, args=(group,), daemon=True, name="abort-channel")
        aborting.start()
        aborting.join(ABORT_S)


def _meet(store: Any, rank: int, joining: timedelta) -> None:
    """Wait for the other end.

    Raises:
        RuntimeError: it did not come.
    """
    store.set(f"nccl/{rank}", "here")
    store.wait([f"nccl/{1 - rank}"], joining)


def _left_behind_after(seconds: float, begin: Callable[[], Any], chunk: torch.Tensor) -> Any:
    """Result of `begin`, by a thread that works on this one's stream.

    Raises:
        RuntimeError: it takes longer, and the thread is left to itself.
    """
    found: Future[Any] = Future()
    stream = torch.cuda.current_stream(chunk.device) if chunk.is_cuda else None

    def work() -> None:
        try:
            with torch.cuda.stream(stream):
                found.set_result(begin())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=work, daemon=True, name="first-operation-of-channel").start()
    try:
        return found.result(seconds)
    except TimeoutError as error:
        raise RuntimeError(f"timeout: the other end did not take part within {seconds:g} s") from error


def _abort(group: Any) -> None:
    with contextlib.suppress(RuntimeError):
        group.abort()

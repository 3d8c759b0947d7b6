"""A connection of two, of one that sends and one engine, that carries payloads over gloo or nccl.

The trainer sends, or an engine that passes on what it got: here it is called the trainer. Each engine has a
group of its own: a collective over all of them would hang everyone when one dies. The group is an object (no
default group is touched, so it does not disturb the ranks' own), and is thrown away after any error; a
restarted engine gets a new one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from actors.cluster.meeting_point import open_meeting_point
from actors.errors import LinkFailure
from actors.sync.payload import Manifest, Payload
from actors.sync.spec import Backend
from actors.sync.transport import Operation, Transport, transport

T = TypeVar("T")

TRAINER, ENGINE = 0, 1
"""Ranks in the group."""
CHUNK_BYTES = 64 * 2**20
"""Sent at once: a dead peer is noticed between chunks, and gloo's own buffers stay small."""
JOIN_S = 10.0
"""Longest that the trainer waits for an engine that has reached its port, and only has to say its address:
should that one die at this very moment, the trainer is free again soon."""
NCCL_SAYS = "Last error:"
"""In torch's errors."""
HEADER = 2
"""Numbers that come first: bytes of the manifest, bytes of the buffer."""


class Listener:
    """The trainer's end before the engine has come: a port that one engine is told."""

    def __init__(self, host: str, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._store = open_meeting_point(host, 0, None, self._timeout, wait=False)
        self.address = f"{host}:{self._store.port}"

    def accept(self, name: str, backend: Backend = "gloo", device: str = "cpu") -> Channel:
        """The connection, once the engine, which has reached the port, has joined. `device`: of the model.

        Raises:
            LinkFailure: it did not within `JOIN_S`.
        """
        joining = min(self._timeout, timedelta(seconds=JOIN_S))
        return Channel(self._store, TRAINER, self._timeout, backend, name, device, joining)


class Connector:
    """The engine's end before the connection: it has reached the trainer's port.

    An engine connects before the trainer waits for it, so that one that dies on its way keeps nobody waiting.
    """

    def __init__(self, address: str, timeout_s: float, name: str = "trainer") -> None:
        """Connect to a `Listener`'s address.

        Raises:
            LinkFailure: nobody listens there, or not within the deadline.
        """
        host, _, port = address.rpartition(":")
        self._name, self._timeout = name, timedelta(seconds=timeout_s)
        try:
            self._store = dist.TCPStore(host, int(port), None, False, self._timeout)
        except RuntimeError as error:
            raise LinkFailure(f"channel to {name}", "sync", f"nobody listens at {address}") from error

    def join(self, backend: Backend = "gloo", device: str = "cpu") -> Channel:
        """The connection, once the trainer accepts it. `device`: of the model.

        Raises:
            LinkFailure: it did not within the deadline; busy with other work, it may take its time.
        """
        return Channel(self._store, ENGINE, self._timeout, backend, self._name, device)


class Channel:
    """One end of a connection. Unusable after the first error."""

    def __init__(
        self,
        store: Any,
        rank: int,
        timeout: timedelta,
        backend: Backend,
        name: str,
        device: str,
        joining: timedelta | None = None,
    ) -> None:
        """`timeout`: of every operation; `device`: type of that of this end's weights, which the other end is
        told; `joining`: of the meeting with the other end, null for the same."""
        self.name = name
        self._peer = ENGINE if rank == TRAINER else TRAINER
        self._store = store
        self._transport: Transport | None = None
        self._guarded(lambda: store.set(f"device/{rank}", device), "connect")
        self._transport = self._guarded(
            lambda: transport(backend, store, rank, timeout, joining or timeout), "connect"
        )
        self._device = self._transport.device
        self.peer_device: str = self._guarded(lambda: store.get(f"device/{self._peer}"), "connect").decode()
        """Type of the device of the other end's weights."""

    def send(self, payload: Payload) -> None:
        """Hand a payload to the other end; returns when all of it is on its way.

        Raises:
            LinkFailure: the peer is gone, or did not take it within the deadline.
        """
        manifest = torch.frombuffer(bytearray(payload.manifest.encoded), dtype=torch.uint8)
        header = torch.tensor([len(manifest), len(payload.buffer)], dtype=torch.int64)
        for tensor in (header, manifest, payload.buffer):
            self._each_chunk(tensor.to(self._device), "send")

    def receive(self) -> Payload:
        """A payload from the other end, in a buffer of its own. Raises as `send`."""
        header = self._each_chunk(torch.empty(HEADER, dtype=torch.int64, device=self._device), "recv")
        sizes = [int(size) for size in header]
        manifest, buffer = (
            self._each_chunk(torch.empty(size, dtype=torch.uint8, device=self._device), "recv")
            for size in sizes
        )
        return Payload(Manifest.decode(manifest.cpu().numpy().tobytes()), buffer)

    def close(self) -> None:
        """Drop the connection; the other end's next call fails."""
        transport, self._transport, self._store = self._transport, None, None
        if transport is not None:
            transport.close()

    def _each_chunk(self, tensor: torch.Tensor, operation: Operation) -> torch.Tensor:
        step = CHUNK_BYTES // tensor.element_size()
        for chunk in tensor.split(step):
            self._guarded(partial(self._move, chunk, operation), operation)
        return tensor

    def _move(self, chunk: torch.Tensor, operation: Operation) -> None:
        if self._transport is None:
            raise RuntimeError("it is closed")
        self._transport.move(chunk, operation, self._peer)

    def _guarded(self, work: Callable[[], T], operation: str) -> T:
        try:
            return work()
        except RuntimeError as error:
            self.close()
            reason = f"{operation} failed: {_why(error)}"
            raise LinkFailure(f"channel to {self.name}", "sync", reason) from error


def own_address() -> str:
    """The address of this node that other nodes of the cluster reach."""
    import ray

    return ray.util.get_node_ip_address() if ray.is_initialized() else socket.gethostbyname("localhost")


def _why(error: BaseException) -> str:
    text = str(error)
    if "closed by peer" in text or "Connection reset" in text or "Broken pipe" in text:
        return "the other end is gone"
    if "imed out" in text or "timeout" in text.lower():
        return "no answer within the deadline"
    # NCCL's own words come last, after the place in torch's code.
    text = text.partition(NCCL_SAYS)[2].strip() or text
    return text.splitlines()[0][:200] if text else type(error).__name__

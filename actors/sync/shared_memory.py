"""Transport between two processes of one machine: through memory that both have mapped, chunk by chunk.

The window, through which chunks go, belongs to the end that sends. A local socket says that a chunk is there
and that it was taken, and carries the window's handle: on CPUs a descriptor of memory that has no name (no
file in /dev/shm outlives anybody), on GPUs CUDA's handle of device memory. The kernel closes a dead
process's end of the socket, so that the other one knows at once.
"""

from __future__ import annotations

import mmap
import os
import pickle
import secrets
import socket
import struct
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import reduce_tensor

NAME_KEY = "shared/name"
"""In the store: the name of rank 0's socket."""
HEAD = struct.Struct("<QQ")
"""Comes before a chunk: its bytes, and those of a new window's handle; 0: the window is the one before."""
TAKEN = b"\x01"


class Window(Protocol):
    """Memory of one end that the other end has mapped."""

    tensor: torch.Tensor
    """uint8 (bytes,)."""


class Memory(Protocol):
    """A kind of memory that windows are made of."""

    device: torch.device

    def make(self, size: int) -> tuple[Window, bytes, list[int]]:
        """A window of `size` bytes; its handle, and descriptors that go with it."""

    def open(self, size: int, handle: bytes, descriptors: list[int]) -> Window:
        """The other end's window."""

    def settle(self) -> None:
        """Return when what was asked of the device is done."""


class SharedMemory:
    """`transport.Transport` through a window."""

    def __init__(self, memory: Memory, store: Any, rank: int, timeout: timedelta, joining: timedelta) -> None:
        """Meet the other end, which has the same `store`. `joining`: deadline of this; `timeout`: of every
        operation.

        Raises:
            RuntimeError: it did not come.
        """
        self.device = memory.device
        self._memory, self._timeout = memory, timeout.total_seconds()
        self._socket: socket.socket | None = _meet(store, rank, joining)
        self._own: Window | None = None
        self._others: Window | None = None

    def move(self, chunk: torch.Tensor, operation: str, peer: int) -> None:
        """As `transport.Transport.move`."""
        if self._socket is None:
            raise RuntimeError("it is closed")
        wire = _Wire(self._socket, time.monotonic() + self._timeout)
        try:
            (self._send if operation == "send" else self._receive)(wire, chunk.view(torch.uint8))
        except OSError as error:
            raise RuntimeError(_in_gloos_words(error)) from error

    def close(self) -> None:
        """As `transport.Transport.close`."""
        own, self._socket = self._socket, None
        self._own = self._others = None
        if own is not None:
            own.close()

    def _send(self, wire: _Wire, chunk: torch.Tensor) -> None:
        size, handle, descriptors = chunk.numel(), b"", list[int]()
        if self._own is None or self._own.tensor.numel() < size:
            self._own = None
            self._own, handle, descriptors = self._memory.make(size)
        self._own.tensor[:size].copy_(chunk)
        self._memory.settle()
        try:
            wire.send(HEAD.pack(size, len(handle)) + handle, descriptors)
        finally:
            _close(descriptors)
        wire.receive(len(TAKEN))

    def _receive(self, wire: _Wire, chunk: torch.Tensor) -> None:
        head, descriptors = wire.receive_with_descriptors(HEAD.size)
        size, length = HEAD.unpack(head)
        if length:
            self._others = None
            try:
                self._others = self._memory.open(size, wire.receive(length), descriptors)
            finally:
                _close(descriptors)
        if size != chunk.numel() or self._others is None:
            raise RuntimeError(f"{size} bytes came, {chunk.numel()} were expected")
        chunk.copy_(self._others.tensor[:size])
        self._memory.settle()
        wire.send(TAKEN)


class _Mapped:
    """A window in unnamed memory of the machine."""

    def __init__(self, descriptor: int, size: int) -> None:
        # One byte more: nothing can't be mapped.
        self._map = mmap.mmap(descriptor, size + 1)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:size]


class HostMemory:
    """Memory of the machine, for ends on CPUs."""

    device = torch.device("cpu")

    def make(self, size: int) -> tuple[Window, bytes, list[int]]:
        """As `Memory.make`; the descriptor is the caller's to close."""
        descriptor = os.memfd_create("raylign-window")
        try:
            os.ftruncate(descriptor, size + 1)
            return _Mapped(descriptor, size), b"memory", [descriptor]
        except BaseException:
            os.close(descriptor)
            raise

    def open(self, size: int, handle: bytes, descriptors: list[int]) -> Window:
        """As `Memory.open`."""
        (descriptor,) = descriptors
        return _Mapped(descriptor, size)

    def settle(self) -> None:
        """A CPU has done what it was asked."""


class _OnDevice:
    """A window in the memory of a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class DeviceMemory:
    """Memory of a GPU on which both ends are. Not run on a GPU yet."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")

    def make(self, size: int) -> tuple[Window, bytes, list[int]]:
        """As `Memory.make`."""
        tensor = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        rebuild, arguments = reduce_tensor(tensor)
        return _OnDevice(tensor), pickle.dumps((rebuild, arguments)), []

    def open(self, size: int, handle: bytes, descriptors: list[int]) -> Window:
        """As `Memory.open`. The handle is of a process that this one has let in itself (`_meet`)."""
        rebuild, arguments = pickle.loads(handle)
        return _OnDevice(rebuild(*arguments))

    def settle(self) -> None:
        """As `Memory.settle`: the other process has streams of its own, which don't wait for this one's."""
        torch.cuda.current_stream(self.device).synchronize()


class _Wire:
    """The socket under one operation's deadline."""

    def __init__(self, own: socket.socket, until: float) -> None:
        """`until`: by time.monotonic()."""
        self._socket, self._until = own, until

    def send(self, data: bytes, descriptors: list[int] | None = None) -> None:
        self._arm()
        sent = socket.send_fds(self._socket, [data], descriptors or [])
        if sent < len(data):
            self._socket.sendall(data[sent:])

    def receive(self, size: int) -> bytes:
        return self.receive_with_descriptors(size)[0]

    def receive_with_descriptors(self, size: int) -> tuple[bytes, list[int]]:
        """Exactly `size` bytes, and what came with them."""
        data, descriptors = b"", list[int]()
        while len(data) < size:
            self._arm()
            more, came, *_ = socket.recv_fds(self._socket, size - len(data), 1)
            descriptors += came
            if not more:
                _close(descriptors)
                raise ConnectionResetError("Connection reset: closed by peer")
            data += more
        return data, descriptors

    def _arm(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timeout")
        self._socket.settimeout(left)


def _meet(store: Any, rank: int, joining: timedelta) -> socket.socket:
    """The connection of the two ends; rank 0 waits, for one of its own user's processes.

    Raises:
        RuntimeError: the other end did not come.
    """
    until = time.monotonic() + joining.total_seconds()
    try:
        if rank:
            store.wait([NAME_KEY], joining)
            own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            own.settimeout(max(0.01, until - time.monotonic()))
            own.connect(store.get(NAME_KEY))
            return own
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            # A name that is in no directory: the kernel forgets it with the process.
            name = b"\0raylign-" + secrets.token_hex(16).encode()
            listener.bind(name)
            listener.listen(1)
            store.set(NAME_KEY, name)
            while True:
                listener.settimeout(max(0.01, until - time.monotonic()))
                own, _ = listener.accept()
                if _user_of(own) == os.getuid():
                    return own
                own.close()
    except OSError as error:
        raise RuntimeError(_in_gloos_words(error)) from error


def _user_of(connection: socket.socket) -> int:
    """The user of the process at the other end, as the kernel knows it."""
    credentials = struct.Struct("3i")
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return int(credentials.unpack(found)[1])


def _in_gloos_words(error: OSError) -> str:
    """An error in words of which `channel` knows the meaning."""
    if isinstance(error, TimeoutError):
        return "timeout: the other end did not take part"
    return str(error)


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())

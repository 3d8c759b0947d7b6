"""The sending ends of one process: of the trainer, or of an engine that passes on what it got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from actors.errors import LinkFailure, RunFailure
from actors.sync.channel import Channel, Listener
from actors.sync.payload import Payload
from actors.sync.spec import Backend


class Outlets:
    """Connections to engines, by their numbers; all of them are waited for at the same time.

    An engine that hangs costs its own deadline and holds up nobody else. Over NCCL payloads are sent one
    after the other: operations of several communicators of one GPU at a time were not tried.
    """

    def __init__(self) -> None:
        self._listeners: dict[int, Listener] = {}
        self._channels: dict[int, Channel] = {}
        self._together = True
        self.devices: set[str] = set()
        """Types of the devices of weights at the other ends so far. Engines further down have the same: the
        processes of a role are alike."""

    def listen(self, engines: Sequence[int], host: str, timeout_s: float) -> dict[int, str]:
        """Open a port for each engine at `host`, this node, in place of an earlier connection to it; their
        addresses. Every wait on these connections ends after `timeout_s`."""
        for engine in engines:
            self.disconnect(engine)
            self._listeners[engine] = Listener(host, timeout_s)
        return {engine: self._listeners[engine].address for engine in engines}

    def accept(
        self, engines: Sequence[int], backend: Backend = "gloo", device: str = "cpu"
    ) -> dict[int, str]:
        """Wait for engines that have reached their addresses; why others did not come within the deadline.
        `device`: type of that of the weights here."""
        self._together = self._together and backend != "nccl"

        def accepted(engine: int) -> None:
            listener = self._listeners.pop(engine, None)
            if listener is None:
                raise LinkFailure(f"channel to engine {engine}", "sync", "nobody listens for it")
            self._channels[engine] = listener.accept(f"engine {engine}", backend, device)
            self.devices.add(self._channels[engine].peer_device)

        return _of_each(accepted, engines)

    def send(self, payload: Payload, engines: Sequence[int]) -> dict[int, str]:
        """Hand a payload to engines that wait for it; the reason of each that could not be reached."""

        def sent(engine: int) -> None:
            if engine not in self._channels:
                raise LinkFailure(f"channel to engine {engine}", "sync", "it is not connected")
            self._channels[engine].send(payload)

        return _of_each(sent, engines, self._together)

    def disconnect(self, engine: int) -> None:
        """Forget an engine."""
        self._listeners.pop(engine, None)
        channel = self._channels.pop(engine, None)
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """Forget all engines."""
        for engine in {*self._listeners, *self._channels}:
            self.disconnect(engine)


def _of_each(work: Callable[[int], None], engines: Sequence[int], together: bool = True) -> dict[int, str]:
    """Reasons of the engines for which `work` failed."""
    failed: dict[int, str] = {}

    def tried(engine: int) -> None:
        try:
            work(engine)
        except RunFailure as error:
            failed[engine] = error.reason

    if not together or len(engines) < 2:
        for engine in engines:
            tried(engine)
        return failed
    with ThreadPoolExecutor(len(engines), thread_name_prefix="outlet") as pool:
        list(pool.map(tried, engines))
    return failed

"""Intake of versions in vLLM's workers: the first one holds the channel to whoever sends, and the others get
from it what it got. So do other engines, where this one passes versions on.

Bytes go from the sender's device to the worker's, and past the engine's own process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from actors.errors import LinkFailure
from actors.sync.channel import CHUNK_BYTES, Backend, Channel, Connector
from actors.sync.outlets import Outlets
from actors.sync.payload import Manifest, Payload


class Intake:
    """One worker's end. All workers of an engine make the same calls."""

    def __init__(self, group: Any, device: torch.device) -> None:
        """`group`: vLLM's `GroupCoordinator` of the engine's tensor-parallel workers; `device`: of this
        worker's weights."""
        self._group, self._device = group, device
        self._connector: Connector | None = None
        self._channel: Channel | None = None
        self._outlets = Outlets()

    @property
    def is_first(self) -> bool:
        """True in the worker that talks to trainer and other engines."""
        return bool(self._group.rank_in_group == 0)

    def connect(self, address: str, timeout_s: float) -> None:
        """Reach whoever sends, at `address`. An earlier connection is dropped.

        Raises:
            LinkFailure: nobody listens there.
        """
        self._disconnect()
        if self.is_first:
            self._connector = Connector(address, timeout_s, "its sender")

    def open(self, backend: Backend) -> None:
        """Connect to whoever was reached.

        Raises:
            LinkFailure: nobody was, or it does not accept.
        """
        if not self.is_first:
            return
        if self._connector is None:
            raise LinkFailure("rollout", "sync", "no trainer was reached", "call connect first")
        connector, self._connector = self._connector, None
        self._channel = connector.join(backend, self._device.type)

    def receive(self) -> Payload:
        """The next payload, in a buffer of this process, on the device of its weights.

        Raises:
            LinkFailure: whoever sends is gone, or nobody is connected; in all workers.
        """
        if self._group.world_size == 1:
            received = self._from_trainer()
        else:
            received = self._to_others() if self.is_first else self._from_first()
        return received.to(self._device)

    def listen(self, engines: Sequence[int], host: str, timeout_s: float) -> dict[int, str]:
        """Addresses at which the first worker waits for engines: see `Outlets.listen`."""
        return self._outlets.listen(engines, host, timeout_s) if self.is_first else {}

    def accept(self, engines: Sequence[int], backend: Backend) -> dict[int, str]:
        """Reasons of engines that did not come: see `Outlets.accept`."""
        return self._outlets.accept(engines, backend, self._device.type) if self.is_first else {}

    @contextmanager
    def passing_on(self, engines: Sequence[int]) -> Iterator[Payload]:
        """The next payload; beside the body it is passed on to these engines.

        One that does not take it costs its deadline here, and holds up no other. Where nothing came they are
        disconnected, so that they need not wait for their deadlines.

        Raises: as `receive`.
        """
        try:
            payload = self.receive()
        except LinkFailure:
            for engine in engines:
                self._outlets.disconnect(engine)
            raise
        if not engines or not self.is_first:
            yield payload
            return
        with ThreadPoolExecutor(1, thread_name_prefix="pass-on") as pool:
            passing = pool.submit(self._outlets.send, payload, engines)
            yield payload
            for engine, reason in passing.result().items():
                print(
                    f"engine {engine} did not take version {payload.manifest.version}: {reason}", flush=True
                )

    def close(self) -> None:
        """Drop all connections."""
        self._disconnect()
        self._outlets.close()

    def _disconnect(self) -> None:
        self._connector = None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _from_trainer(self) -> Payload:
        if self._channel is None:
            raise LinkFailure("rollout", "stage", "no trainer is connected", "call open_channel first")
        return self._channel.receive()

    def _to_others(self) -> Payload:
        try:
            payload = self._from_trainer()
        except LinkFailure as failure:
            self._group.broadcast_object(failure)
            raise
        buffer = payload.buffer
        self._group.broadcast_object((payload.manifest, buffer.numel(), buffer.device.type))
        self._spread(buffer)
        return payload

    def _from_first(self) -> Payload:
        announced: LinkFailure | tuple[Manifest, int, str] = self._group.broadcast_object()
        if isinstance(announced, LinkFailure):
            raise announced
        manifest, size, device = announced
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._spread(buffer)
        return Payload(manifest, buffer)

    def _spread(self, buffer: torch.Tensor) -> None:
        group = self._group.cpu_group if buffer.device.type == "cpu" else self._group.device_group
        for chunk in buffer.split(CHUNK_BYTES):
            dist.broadcast(chunk, src=self._group.ranks[0], group=group)

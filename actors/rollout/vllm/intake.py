"""Intake of versions in vLLM's workers: the first one holds the channel to the trainer, and the others get
from it what it got.

Bytes go from the trainer's device to the worker's, and past the engine's own process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from actors.errors import RunFailure
from actors.sync.channel import CHUNK_BYTES, Backend, Channel, Connector
from actors.sync.payload import Manifest, Payload


class Intake:
    """One worker's end. All workers of an engine make the same calls."""

    def __init__(self, group: Any, device: torch.device) -> None:
        """`group`: vLLM's `GroupCoordinator` of the engine's tensor-parallel workers; `device`: of this
        worker's weights."""
        self._group, self._device = group, device
        self._connector: Connector | None = None
        self._channel: Channel | None = None

    @property
    def is_first(self) -> bool:
        """True in the worker that the trainer talks to."""
        return bool(self._group.rank_in_group == 0)

    def connect(self, address: str, timeout_s: float) -> None:
        """Reach the trainer that listens at `address`. An earlier connection is dropped.

        Raises:
            RunFailure: nobody listens there.
        """
        self.close()
        if self.is_first:
            self._connector = Connector(address, timeout_s)

    def open(self, backend: Backend) -> None:
        """Connect to the trainer that was reached.

        Raises:
            RunFailure: none was, or it does not accept.
        """
        if not self.is_first:
            return
        if self._connector is None:
            raise RunFailure("rollout", "sync", "no trainer was reached", "call connect first")
        connector, self._connector = self._connector, None
        self._channel = connector.join(backend, self._device.type)

    def receive(self) -> Payload:
        """The next payload, in a buffer of this process, on the device of its weights.

        Raises:
            RunFailure: the trainer is gone, or none is connected; in all workers.
        """
        if self._group.world_size == 1:
            received = self._from_trainer()
        else:
            received = self._to_others() if self.is_first else self._from_first()
        return received.to(self._device)

    def close(self) -> None:
        """Drop the connection."""
        self._connector = None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _from_trainer(self) -> Payload:
        if self._channel is None:
            raise RunFailure("rollout", "stage", "no trainer is connected", "call open_channel first")
        return self._channel.receive()

    def _to_others(self) -> Payload:
        try:
            payload = self._from_trainer()
        except RunFailure as failure:
            self._group.broadcast_object(failure)
            raise
        buffer = payload.buffer
        self._group.broadcast_object((payload.manifest, buffer.numel(), buffer.device.type))
        self._spread(buffer)
        return payload

    def _from_first(self) -> Payload:
        announced: RunFailure | tuple[Manifest, int, str] = self._group.broadcast_object()
        if isinstance(announced, RunFailure):
            raise announced
        manifest, size, device = announced
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._spread(buffer)
        return Payload(manifest, buffer)

    def _spread(self, buffer: torch.Tensor) -> None:
        group = self._group.cpu_group if buffer.device.type == "cpu" else self._group.device_group
        for chunk in buffer.split(CHUNK_BYTES):
            dist.broadcast(chunk, src=self._group.ranks[0], group=group)

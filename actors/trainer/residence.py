"""Place of a rank's weights and optimizer: its device, or the host while an engine has that.

Storages are emptied and filled in place. Every parameter, view, gradient and moment stays the object that it
is, so that optimizer, flat buffers and sharding know nothing of it, and what comes back is the same to the
bit. Whoever asks for weights meanwhile is stopped by `HostState`.

Without a GPU there is no memory to give back. What is parked is overwritten instead, so that results show
whoever uses it all the same.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor

from actors.cluster.turn_plan import Moves, TrainerBytes
from actors.models.parallel.fsdp import own_slice
from actors.models.quantization.quantised_tensor import held
from actors.trainer.host_state import HostState
from actors.trainer.updates import Updates

NAN_BYTE = 0xFF
"""Numbers of these bytes are NaN, in every floating format that weights have."""


class Residence:
    """Parks what one rank holds, and brings it back."""

    def __init__(self, state: HostState, updates: Updates) -> None:
        self._state, self._updates = state, updates
        self._device = torch.device(state.spec.device)
        self._parked: list[tuple[torch.UntypedStorage, Tensor]] | None = None
        """Storages that hold nothing, and what was in them; None: awake."""

    def bytes(self) -> TrainerBytes:
        """Bytes of this rank, by what they are; moments that the first step will make are counted."""
        weights, optimizer = _size(_storages(self._weights())), _size(_storages(self._of_training()))
        if not any(training.optimizer.state for training in self._updates.trainings.values()):
            optimizer += 2 * sum(4 * training.n_parameters for training in self._updates.trainings.values())
        if self._device.type == "cpu":
            return TrainerBytes(weights, optimizer, 0, psutil.virtual_memory().total, True)
        peak = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        total = torch.cuda.get_device_properties(self._device).total_memory
        return TrainerBytes(weights, optimizer, peak, total, False)

    def park(self, moves: Moves) -> bool:
        """Give the device up: `moves` goes to the host. True if weights are awake afterwards."""
        if self._parked is not None:
            return False
        self._state.free_gathered()
        tensors: list[Tensor] = []
        if moves != "none":
            tensors += self._of_training()
        if moves == "all":
            tensors += self._weights()
        self._parked = [(storage, self._emptied(storage)) for storage in _storages(tensors)]
        self._state.parked = True
        self._give_back()
        return False

    def wake(self) -> bool:
        """Take the device: everything is where it was. True if weights are awake afterwards."""
        parked, self._parked = self._parked or [], None
        for storage, copy in parked:
            if storage.device.type == "cuda":
                storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._state.parked = False
        return True

    def _emptied(self, storage: torch.UntypedStorage) -> Tensor:
        on_gpu = storage.device.type == "cuda"
        copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
        copy.copy_(_bytes_of(storage))
        if on_gpu:
            storage.resize_(0)
        else:
            _bytes_of(storage).fill_(NAN_BYTE)
        return copy

    def _give_back(self) -> None:
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def _weights(self) -> list[Tensor]:
        heads = [parameter for head in self._state.heads.values() for parameter in head.parameters()]
        return [*self._state.base.parameters(), *self._state.base.buffers(), *heads]

    def _of_training(self) -> list[Tensor]:
        """Gradients and moments."""
        trainings = self._updates.trainings.values()
        grads = [bucket.flat.grad for training in trainings for bucket in training.buckets]
        states = [state for training in trainings for state in training.optimizer.state.values()]
        values = [value for state in states for value in state.values()]
        return [value for value in [*grads, *values] if isinstance(value, Tensor)]


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Memory behind tensors, each once: parameters are views of flat buffers; quantised ones have parts."""
    found = {}
    for part in (part for tensor in tensors for part in held(tensor)):
        storage = own_slice(part).untyped_storage()
        if storage.nbytes():
            found[storage._cdata] = storage
    return list(found.values())


def _size(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

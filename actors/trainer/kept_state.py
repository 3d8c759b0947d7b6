"""State of a rank as another process can keep it: what a fresh rank, given the same calls, needs to go on bit
for bit.

`whole`: values of all adapters and heads, and of what trains. Between two of them nothing but steps happens,
so that parts without `whole` have what trains alone: flat buffers, moments, schedule. Arrays of bytes, which
Ray writes to its object store in one copy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from torch import Tensor

from actors.models.lora import adapters
from actors.models.parallel.fsdp import own_slice
from actors.trainer.host_state import HostState
from actors.trainer.state_bytes import bytes_of, fill
from actors.trainer.updates import Updates

SHARE_OF_MEMORY = 0.25
"""Of the memory that is free on this node: a larger state is not kept. It is that of a base that trains as a
whole, whose copies would take the memory that it needs itself."""


@dataclass(frozen=True)
class Kept:
    """Facts of a state that was handed over."""

    kept: bool
    """False: too large."""
    seconds: float
    """Time that the rank took for it."""
    nbytes: int


class KeptState:
    """The part of a `ModelHost` that hands its state over, and takes it back."""

    def __init__(self, state: HostState, updates: Updates) -> None:
        self._state, self._updates = state, updates

    def take(self, whole: bool) -> tuple[Kept, dict[str, Any] | None]:
        """This rank's part of what changes in steps, and with `whole` of all that calls may have changed."""
        began = time.perf_counter()
        state = self._updates.snapshot()
        if whole:
            state |= {name: {} for name in ("adapters", "heads")}
            for name, tensors in self._frozen().items():
                state["adapters"][name] = {key: bytes_of(tensor) for key, tensor in tensors.items()}
            for role, head in self._state.heads.items():
                state["heads"][role] = bytes_of(head.weight)
        nbytes = _size(state)
        fits = nbytes <= SHARE_OF_MEMORY * psutil.virtual_memory().available
        return Kept(fits, time.perf_counter() - began, nbytes), state if fits else None

    def put(self, *states: dict[str, Any]) -> None:
        """Take over what `take` handed over, on a rank that got the same calls since it was built; a later
        state after an earlier one."""
        for state in states:
            for name, tensors in state.get("adapters", {}).items():
                own = self._tensors(name)
                for key, kept in tensors.items():
                    fill(own[key], kept)
            for role, kept in state.get("heads", {}).items():
                fill(self._state.heads[role].weight.detach(), kept)
            self._updates.put(state)

    def _frozen(self) -> dict[str, dict[str, Tensor]]:
        """This rank's part of adapters that don't train."""
        names = adapters.adapter_names(self._state.model)
        return {name: self._tensors(name) for name in names if name not in self._updates.trainings}

    def _tensors(self, name: str) -> dict[str, Tensor]:
        parameters = adapters.adapter_parameters(self._state.model, name)
        return {key: own_slice(parameter) for key, parameter in parameters.items()}


def _size(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0

"""Versions of a policy in LoRA slots of vLLM, in vLLM's worker process: the base stays as it was loaded.

A version is put into a slot that no request uses, read back out of the tensors that the kernels compute with,
and served by its name once the engine says so; the slot before it stays as it is until the next version
comes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actors.errors import InvariantViolation, RunFailure
from actors.models.architectures.conversion import conversion_model
from actors.models.lora.low_rank import Factors
from actors.rollout.vllm.slot_places import DOWN, GATE_UP, Homes, Place, SlotMap, slots_of, whole_slot
from actors.rollout.vllm.workarounds.registry import LEANT_ON
from actors.sync.digests import Algorithm, Digests
from actors.sync.payload import Payload, PayloadEntry, factor_name

SLOTS = 2
"""Versions take them in turns. On the CPU vLLM computes tokens without adapter with slot -1, the last one
(lora/punica_wrapper/punica_cpu.py); there are such tokens only before the first version is served, when only
the first slot can be filled."""
BITS = {2: torch.int16, 4: torch.int32}
"""By size of an element: the integer that is compared."""


@dataclass
class Slot:
    """A version in a slot."""

    version: int
    number: int
    """vLLM's `lora_int_id`: counted by stagings, so that no two of an engine are ever mixed up."""
    payload: Payload
    homes: Homes
    seconds: float = 0.0


class AdapterSlots:
    """The slots of one worker."""

    def __init__(self, manager: Any, meta: Any, dtype: torch.dtype) -> None:
        """`manager`: vLLM's `LoRAModelManager`; `meta`: transformers' model of the base, without storage;
        `dtype`: of the engine."""
        self._manager, self._map = manager, SlotMap(manager, meta)
        self._dtype = str(dtype).removeprefix("torch.")
        self._count = 0
        self._last: tuple[tuple[PayloadEntry, ...], Homes] = ((), {})
        self._served: Slot | None = None
        self.staged: Slot | None = None
        self.in_use: list[str] = []
        """Names of slots besides the served one that samples are generated with: they can't be given away."""

    def stage(self, payload: Payload) -> None:
        """Put a version into a free slot.

        Raises:
            RunFailure: it is no payload for slots, of another dtype, or has weights without a place; or not
                all of it is bound. The engine serves on.
        """
        manifest = payload.manifest
        if manifest.payload != "lora":
            raise _refusal(f"this engine keeps LoRA in slots, and was sent a payload '{manifest.payload}'")
        other = [entry for entry in manifest.entries if entry.dtype != self._dtype]
        if other:
            raise _refusal(f"{other[0].name} is {other[0].dtype}, the engine computes in {self._dtype}")
        if self.in_use:
            raise _refusal(f"samples are still being generated with the slot of {self.in_use[0]}")
        homes = self._homes(payload)
        began = time.monotonic()
        self.discard()
        self._give_away()
        self._count += 1
        self.staged = Slot(manifest.version, self._count, payload, homes)
        try:
            self._put(self.staged)
        except Exception:
            self.discard()
            raise
        self.staged.seconds = time.monotonic() - began
        bound, expected = self.bound()
        if bound != expected or not bound:
            self.discard()
            raise _refusal(f"bound {bound} of {expected} tensors of version {manifest.version} in the slot")

    def bound(self) -> tuple[int, int]:
        """Of the staged version: places of A and B that the model's layers filled, and how many there are."""
        slot = self._the_staged()
        model, manager = self._manager.model, self._manager
        taken = manager.get_adapter(slot.number).loras
        paths = {
            path
            for path, layer in manager.modules.items()
            if path in taken and model.get_submodule(path) is layer
        }
        places = [place for home in slot.homes.values() for place in home.places]
        return sum(place.module in paths for place in places), len(places)

    def discard(self) -> None:
        """Forget what is staged."""
        if self.staged is not None:
            self._manager.remove_adapter(self.staged.number)
        self.staged = None

    def switch(self, version: int) -> None:
        """From now on the staged version is the served one; the slot of the one before stays."""
        slot = self._the_staged()
        if slot.version != version:
            raise RunFailure("rollout", "commit", f"version {version} is not staged")
        self._served, self.staged = slot, None

    def partial(self) -> dict[str, list[int]]:
        """Of the staged version the A and B of which this process has a share only: how many elements, and
        how many there are."""
        found: dict[str, list[int]] = {}
        for name, home in self._the_staged().homes.items():
            for part in "AB":
                own = [place for place in home.places if place.part == part]
                # Gate and up hold different shares of one B, and the same A.
                shares = {place.source: torch.Size(place.source.shape).numel() for place in own}
                here, whole = sum(shares.values()), torch.Size(own[0].shape).numel()
                if here != whole:
                    found[factor_name(name, part)] = [here, whole]
        return found

    def read(self, version: int) -> tuple[Algorithm, dict[str, str]]:
        """Digests of what a slot holds, by `factor_name`, with their algorithm. Another worker's share counts
        as it was sent.

        Raises:
            RunFailure: no slot holds this version.
            InvariantViolation: a slot holds something where nothing was put.
        """
        slot = next((s for s in (self.staged, self._served) if s is not None and s.version == version), None)
        if slot is None or slot.number not in self._manager.lora_index_to_id:
            raise RunFailure("rollout", "readback", f"no slot holds version {version}")
        index = self._manager.lora_index_to_id.index(slot.number)
        sent, found = slot.payload.tensors(), Digests(slot.payload.manifest.algorithm)
        for name, home in slot.homes.items():
            for part in "AB":
                places = [place for place in home.places if place.part == part]
                found.take(factor_name(name, part), self._found(places, index, sent[name, part]))
        self._refuse_remains(slot, index)
        return found.algorithm, found.read()

    def _found(self, places: list[Place], index: int, sent: torch.Tensor) -> torch.Tensor:
        """What a slot holds of an A or B: what was sent, but for what is otherwise in one of its places."""
        found = sent
        for place in places:
            bound = place.bound(self._manager.modules[place.module], index)
            if not _same_bits(bound, place.source.view(sent)):
                found = sent.clone() if found is sent else found
                place.source.view(found).copy_(bound)
        return found

    def _refuse_remains(self, slot: Slot, index: int) -> None:
        """Room that the version leaves is zero in its slot."""
        homes = slot.homes.values()
        filled = {(p.module, p.stack, p.index): p for home in homes for p in home.places}
        for path, layer in self._manager.modules.items():
            for stack, number in slots_of(layer):
                place = filled.get((path, stack, number))
                own = 0 if place is None else int(place.bound(layer, index).count_nonzero())
                if int(whole_slot(layer, stack, number, index).count_nonzero()) != own:
                    reason = f"the slot of version {slot.version} is not zero where it has no weights: {path}"
                    raise InvariantViolation("rollout", "readback", reason)

    def _give_away(self) -> None:
        """Empty all slots but the served one's."""
        kept = None if self._served is None else self._served.number
        for number in self._manager.list_adapters():
            if number != kept:
                self._manager.remove_adapter(number)

    def _put(self, slot: Slot) -> None:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        factors, loras = slot.payload.factors(), {}
        for name, of in factors.items():
            module, rank = slot.homes[name].module, of.a.shape[-2]
            if of.a.ndim == 3:
                loras[module] = _of_experts(module, name, factors)
            else:
                # A scaling of 1: B has it already.
                loras[module] = LoRALayerWeights(module, rank, rank, of.a, of.b, 1.0)
        largest = max(lora.rank for lora in loras.values())
        self._manager.add_adapter(LoRAModel(slot.number, largest, loras))
        self._manager.activate_adapter(slot.number)

    def _homes(self, payload: Payload) -> Homes:
        if payload.manifest.entries != self._last[0]:
            self._last = payload.manifest.entries, self._map.homes(payload.factors())
        return self._last[1]

    def _the_staged(self) -> Slot:
        if self.staged is None:
            raise RunFailure("rollout", "commit", "nothing is staged")
        return self.staged


def _of_experts(module: str, name: str, factors: Mapping[str, Factors]) -> Any:
    """What vLLM's manager packs of a layer's experts: gate, down, up (`w1`, `w2`, `w3`).

    Raises:
        RunFailure: the version has only one of the two stacks.
    """
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    path = name.rpartition(".")[0]
    gate_up, down = factors.get(f"{path}.{GATE_UP}"), factors.get(f"{path}.{DOWN}")
    if gate_up is None or down is None:
        raise _refusal(f"{path}: a slot takes {GATE_UP} and {DOWN} together")
    gate, up = gate_up.b.chunk(2, dim=1)
    rank = gate_up.a.shape[-2]
    a, b = [gate_up.a, down.a, gate_up.a], [gate, down.b, up]
    return PackedLoRALayerWeights(module, rank, [rank] * 3, a, b, [1.0] * 3)


def slots_of_worker(runner: Any, base: str) -> AdapterSlots:
    """The slots of the worker with this model runner of vLLM, whose model was loaded from directory `base`.

    Raises:
        RunFailure: the installed vLLM is another one than this was written for.
    """
    from transformers import AutoConfig
    from vllm.config import set_current_vllm_config

    LEANT_ON["lora_slots"].check()
    config = AutoConfig.from_pretrained(base, trust_remote_code=runner.model_config.trust_remote_code)
    # vLLM's transformers backend derives transformers' classes from its own, which ask for its config.
    with set_current_vllm_config(runner.vllm_config):
        meta = conversion_model(config)
    return AdapterSlots(runner.lora_manager._adapter_manager, meta, runner.model_config.dtype)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    integer = BITS[one.element_size()]
    return torch.equal(one.view(integer), other.to(one.device).view(integer))


def _refusal(reason: str) -> RunFailure:
    return RunFailure("rollout", "stage", reason)

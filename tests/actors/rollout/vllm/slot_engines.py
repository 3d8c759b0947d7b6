"""Policies and engines for the tests of LoRA slots: the real ones, whose slots can be spoilt on request."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from actors.models.base.loading import load_base
from actors.models.lora.adapters import attach_lora
from actors.models.lora.low_rank import Factors
from actors.models.lora.merge import adapter_factors
from actors.models.spec import LoraSpec, ModelSpec, TargetGroup
from actors.rollout import slot_updater
from actors.rollout.engine import RolloutEngine
from actors.sync.digests import digest_of
from actors.sync.payload import Payload, factor_name, pack_adapter
from actors.sync.spec import SlotSpec
from tests.actors.rollout.vllm.vllm_cases import Policy, UnaidedEngine

O_PROJ = "model.layers.1.self_attn.o_proj"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def packed(version: int, factors: dict[str, Factors]) -> Payload:
    """What a trainer sends of a float32 base for a slot."""
    return pack_adapter(version, "float32", factors, kind="lora")


class SlotPolicy(Policy):
    """A policy whose rank is below a slot's and whose scaling is not 1."""

    def __init__(self, base: Path, targets: list[TargetGroup]) -> None:
        lora = LoraSpec(r=4, lora_alpha=6, targets=targets)
        self.spec = ModelSpec(base=str(base), lora=lora)
        self.base, self.architecture = base, base.name
        self.peft: Any = attach_lora(load_base(self.spec), lora, "policy").eval()

    def factors(self, dtype: torch.dtype = torch.float32) -> dict[str, Factors]:
        """A and s B as slots hold them."""
        return {n: f.scaled(dtype) for n, f in adapter_factors(self.peft, "policy").items()}

    def staged(self, version: int, dtype: torch.dtype = torch.float32) -> Payload:
        return packed(version, self.factors(dtype))

    def slot_digests(self, dtype: torch.dtype = torch.float32) -> dict[str, str]:
        """By A and B, from the model."""
        found = {}
        for name, f in self.factors(dtype).items():
            found[factor_name(name, "A")], found[factor_name(name, "B")] = digest_of(f.a), digest_of(f.b)
        return found


class SpoiltSlots(RolloutEngine):
    """An engine with vLLM's worker in its own process, into whose slots one can reach."""

    def spoil(self, what: str) -> None:
        """Change something in the staged slot, or in how the next one is filled."""
        slots = self._worker()._versions
        manager = slots._manager
        layer = manager.modules[O_PROJ]
        if what == "a layer that takes nothing up":
            # As where a name of LoRA is not a layer's: vLLM passes it over without a word.
            pack = manager._create_merged_loras_inplace
            manager._create_merged_loras_inplace = lambda lora: (lora.loras.pop(O_PROJ), pack(lora))
        elif what == "a layer that the model has not":
            manager.modules[O_PROJ] = copy.copy(layer)
        elif what == "nothing":
            manager.__dict__.pop("_create_merged_loras_inplace", None)
            manager.modules[O_PROJ] = manager.model.get_submodule(O_PROJ)
        else:
            index = manager.lora_index_to_id.index(slots.staged.number)
            a, b = layer.lora_a_stacked[0], layer.lora_b_stacked[0]
            cell = {
                "one element": b[index, 0, 3, 2],
                "the room beyond the rank": a[index, 0, 5, 0],
            }[what]
            cell += 1e-6

    def _worker(self) -> Any:
        assert self._llm is not None
        core: Any = self._llm.llm_engine.model_executor
        return core.driver_worker.worker


class UncomputedExperts(UnaidedEngine, SpoiltSlots):
    """An engine on the CPU whose experts have slots, as on a GPU; it can't compute a token."""

    without = frozenset({"experts_without_slots"})

    def load(self, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(slot_updater, "_no_kernel", return_value=[]):
            return super().load(*args, **kwargs)

    def spoil_expert(self) -> None:
        """One element of what the up projection of an expert has of A, which gate has too."""
        slots = self._worker()._versions
        index = slots._manager.lora_index_to_id.index(slots.staged.number)
        # Mixtral's checkpoints, and vLLM, have another name between.
        (layer,) = (
            layer
            for path, layer in slots._manager.modules.items()
            if path.startswith("model.layers.1.") and path.endswith(".experts")
        )
        layer.w13_lora_a_stacked[1][index, 5, 1, 7] += 1e-6


def slots(modules: tuple[str, ...], rank: int = 4) -> SlotSpec:
    return SlotSpec(rank, modules)

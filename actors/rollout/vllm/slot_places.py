"""Places of LoRA's A and B in the slots that vLLM's layers keep beside their weights.

A layer has its slots in tensors of shape (slots, 1, rank, in) and (slots, 1, out, rank), one for each weight
that it fuses; experts in (slots, experts, rank, in) and (slots, experts, out, rank). Which of them is whose
is read off vLLM's manager, and how tensor-parallel workers cut them off its layers' own functions, which are
run on tensors without storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actors.errors import RunFailure
from actors.models.lora.low_rank import Factors
from actors.models.lora.pieces import checkpoint_shapes
from actors.rollout.vllm.parameter_map import Region

LINEAR = ("lora_a_stacked", "lora_b_stacked")
"""Attributes of vLLM's linear layers with LoRA: tuples with the slots of A and of B."""
EXPERTS = ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked")
"""The same of a layer's experts: of gate and up, and of down."""
GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""Names of a stack of experts' weights in transformers; gate comes first."""


@dataclass(frozen=True)
class Place:
    """The share of an A or B that one worker keeps in one tensor of a layer."""

    part: str
    """`A` or `B`, as a payload names them."""
    source: Region
    """In A ([experts,] r, in) or B ([experts,] out, r)."""
    shape: tuple[int, ...]
    """Of all of A or B."""
    module: str
    stack: str
    """One of `LINEAR` or `EXPERTS`."""
    index: int
    """In the tuple."""

    def bound(self, layer: nn.Module, slot: int) -> torch.Tensor:
        """Its values in a slot of the layer."""
        kept = whole_slot(layer, self.stack, self.index, slot)
        return kept[..., : self.source.shape[-2], : self.source.shape[-1]].reshape(self.source.shape)


@dataclass(frozen=True)
class Home:
    """The places of one adapted weight."""

    module: str
    """vLLM's name for its module, also where it is a part of a fused one."""
    places: tuple[Place, ...]
    """Of A and of B. What two layers of one weight share, as gate and up share A, has a place in each."""


Homes = dict[str, Home]
"""By the adapted weight's name in the bare base."""


class SlotMap:
    """Finds the layers of adapted weights in a vLLM model with LoRA."""

    def __init__(self, manager: Any, meta: Any) -> None:
        """`manager`: vLLM's `LoRAModelManager`; `meta`: transformers' model of the base, without storage."""
        self._manager, self._meta = manager, meta
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        self._mapper = None if mapper is None else mapper.get_rename_mapper()
        self._parts = {
            part: (path, index)
            for path, parts in manager.packed_modules.items()
            if path in manager.modules
            for index, part in enumerate(parts)
        }

    def homes(self, factors: Mapping[str, Factors]) -> Homes:
        """Of every adapted weight.

        Raises:
            RunFailure: weights that no layer keeps LoRA for, or not of this shape or rank; all of them.
        """
        found, problems = {}, []
        for name, of in factors.items():
            try:
                home = self._experts(name, of) if of.a.ndim == 3 else self._linear(name, of)
                self._refuse_other_room(home)
                found[name] = home
            except _NoPlaceError as error:
                problems.append(f"{name} {error}")
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise RunFailure("rollout", "stage", "; ".join(problems[:3]) + more)
        return found

    def _linear(self, name: str, factors: Factors) -> Home:
        module = self._module_of(name, factors)
        path, index = self._parts.get(module, (module, 0))
        layer = self._layer(path, module)
        parts = len(self._manager.packed_modules.get(path, [path]))
        if layer.n_slices != parts:
            raise _NoPlaceError(f"is one of {parts} parts of {path}, which keeps LoRA for {layer.n_slices}")
        a, b = _without_storage(factors)
        if layer.tp_size == 1:
            cut_a, cut_b = a, b
        elif parts == 1:
            cut_a, cut_b = layer.slice_lora_a(a), layer.slice_lora_b(b)
        else:
            of_all = [[one if i == index else None for i in range(parts)] for one in (a, b)]
            cut_a, cut_b = layer.slice_lora_a(of_all[0])[index], layer.slice_lora_b(of_all[1])[index]
        return Home(
            module,
            (_place("A", cut_a, a, path, LINEAR[0], index), _place("B", cut_b, b, path, LINEAR[1], index)),
        )

    def _experts(self, name: str, factors: Factors) -> Home:
        """Of a stack of experts: transformers keeps gate above up, vLLM each by itself (`w1`, `w3`)."""
        from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA

        module = self._module_of(name, factors)
        layer = self._layer(module, module)
        plain = isinstance(layer, FusedMoEWithLoRA) and not isinstance(layer, FusedMoE3DWithLoRA)
        if not plain or layer.use_ep or layer.enable_moe_shared_loras or layer._w13_slices != 2:
            raise _NoPlaceError(f"is kept by {module} in a layout that can't be read back")
        a, b = _without_storage(factors)
        leaf = name.rpartition(".")[2]
        if leaf == DOWN:
            cut_a, cut_b = layer._slice_w2_a(a), layer._slice_w2_b(b)
            places = [
                _place("A", cut_a, a, module, EXPERTS[2], 0),
                _place("B", cut_b, b, module, EXPERTS[3], 0),
            ]
        elif leaf == GATE_UP:
            cut_a, halves = layer._slice_w13_a(a), b.chunk(2, dim=1)
            places = [_place("A", cut_a, a, module, EXPERTS[0], i) for i in (0, 1)]
            cuts = [layer._slice_w13_b(half) for half in halves]
            places += [_place("B", cut, b, module, EXPERTS[1], i) for i, cut in enumerate(cuts)]
        else:
            raise _NoPlaceError(f"is neither {GATE_UP} nor {DOWN} of experts")
        return Home(module, tuple(places))

    def _layer(self, path: str, module: str) -> Any:
        layer = self._manager.modules.get(path)
        if layer is None:
            raise _NoPlaceError(f"is bound to no module of the engine: it keeps no LoRA for {module}")
        return layer

    def _refuse_other_room(self, home: Home) -> None:
        for place in home.places:
            layer, share = self._manager.modules[place.module], place.source.shape
            room = tuple(whole_slot(layer, place.stack, place.index, 0).shape)[-len(share) :]
            rank = len(share) - (2 if place.part == "A" else 1)
            fits = all(
                have >= want if i == rank else have == want for i, (have, want) in enumerate(zip(room, share))
            )
            if not fits:
                raise _NoPlaceError(
                    f"has a share {share} in this process, and {place.module} has room for {room}"
                )

    def _module_of(self, name: str, factors: Factors) -> str:
        """vLLM's name for the module of an adapted weight, whether it has such a module or not."""
        in_checkpoint = sorted(checkpoint_shapes(self._meta, name, factors))
        if factors.a.ndim == 3:
            module = in_checkpoint[0].rpartition(".experts.")[0] + ".experts"
        elif len(in_checkpoint) == 1:
            module = in_checkpoint[0].removesuffix(".weight")
        else:
            raise _NoPlaceError(f"is {len(in_checkpoint)} tensors in a checkpoint")
        return module if self._mapper is None else str(self._mapper._map_name(module))


def whole_slot(layer: nn.Module, stack: str, index: int, slot: int) -> torch.Tensor:
    """All of one slot: (1 or experts, room for the rank, in) or (1 or experts, out, room for the rank)."""
    found: torch.Tensor = getattr(layer, stack)[index][slot]
    return found


def slots_of(layer: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and index of every tensor with the slots of a layer."""
    for stack in EXPERTS if hasattr(layer, EXPERTS[0]) else LINEAR:
        for index in range(len(getattr(layer, stack))):
            yield stack, index


class _NoPlaceError(Exception):
    """Why a weight has no place."""


def _without_storage(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(factors.a.shape, device="meta"), torch.empty(factors.b.shape, device="meta")


def _place(part: str, cut: torch.Tensor, whole: torch.Tensor, module: str, stack: str, index: int) -> Place:
    """The place of what vLLM's own functions have cut out of a tensor without storage."""
    if cut.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        raise _NoPlaceError("is put together anew for tensor-parallel workers, which can't be read back")
    return Place(part, Region.of(cut), tuple(whole.shape), module, stack, index)

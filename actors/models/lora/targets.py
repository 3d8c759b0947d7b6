"""Resolves target groups (`attention`, `experts`, ...) to the explicit names that PEFT wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from actors.errors import UserError
from actors.models.architectures.lookup import architecture_of
from actors.models.architectures.row import Architecture
from actors.models.spec import LoraSpec, TargetGroup

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
from actors.models.architectures.meta_model import meta_model

BYTES_PER_PARAMETER = 4
"""Adapters are trained and saved in float32 whatever the base's dtype."""


@dataclass(frozen=True)
class GroupTargets:
    """Names, counts and sizes of one target group on a base."""

    group: TargetGroup
    names: tuple[str, ...]
    """Suffixes handed to PEFT."""
    tensors: int
    """Weights that get an A and a B."""
    rank: int
    parameters: int
    """Adapter parameters (A and B of every weight and expert)."""
    adapted: int
    """Parameters of the weights themselves: what merging changes."""

    @property
    def bytes(self) -> int:
        return self.parameters * BYTES_PER_PARAMETER


@dataclass(frozen=True)
class Targets:
    """LoRA targets by explicit names, with counts and sizes. `print(targets)` is the table for users."""

    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    rank_pattern: dict[str, int]
    """PEFT's `rank_pattern`: regular expression of a parameter name -> rank, where it isn't `r`."""
    groups: tuple[GroupTargets, ...]
    base_parameters: int

    @property
    def parameters(self) -> int:
        return sum(group.parameters for group in self.groups)

    @property
    def adapted(self) -> int:
        return sum(group.adapted for group in self.groups)

    @property
    def bytes(self) -> int:
        return self.parameters * BYTES_PER_PARAMETER

    def __str__(self) -> str:
        lines = [
            f"{g.group:<15} {g.tensors:>5} weights, rank {g.rank:<4} {_size(g.bytes):>9}  {' '.join(g.names)}"
            for g in self.groups
        ]
        share = 100 * self.parameters / max(self.base_parameters, 1)
        counts = f"{self.parameters:,} of {self.base_parameters:,} parameters"
        total = f"{counts} ({share:.2f} %), {_size(self.bytes)}"
        return "\n".join([*lines, f"{'total':<15} {total}"])


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def expert_rank(lora: LoraSpec, top_k: int) -> int:
    """Rank of each expert's adapter.

    Raises:
        UserError: `r` is not a multiple of the experts per token.
    """
    if lora.expert_rank == "r":
        return lora.r
    if lora.r % top_k:
        raise UserError(
            f"model.lora.r: {lora.r} is not a multiple of the base's {top_k} experts per token, "
            f"which expert_rank: r/top_k needs; try {max(1, round(lora.r / top_k)) * top_k}"
        )
    return lora.r // top_k


def resolve_targets(
    model: PreTrainedModel | PretrainedConfig, groups: Sequence[TargetGroup], lora: LoraSpec | None = None
) -> Targets:
    """Resolve target groups on a model (or, with meta tensors, on its config).

    `lora` gives the ranks for the counts (its defaults when None); its own `targets` are not read.

    Raises:
        UserError: a group matches nothing in this architecture (all such groups, and those that do).
    """
    lora = lora or LoraSpec()
    net = model if isinstance(model, nn.Module) else meta_model(model)
    row = architecture_of(net.config)
    weights = _weights(net)
    matched = {group: _match(row, group, weights) for group in dict.fromkeys(groups)}
    _refuse_groups(row, matched, weights)
    ranks = dict.fromkeys(matched, lora.r)
    if "experts" in matched:
        ranks["experts"] = expert_rank(lora, row.top_k(net.config))
    own_ranks = [g for g in matched if ranks[g] != lora.r]
    return Targets(
        target_modules=tuple(n for g in matched for n in row.modules.get(g, ()) if n in matched[g]),
        target_parameters=tuple(n for g in matched for n in row.parameters.get(g, ()) if n in matched[g]),
        rank_pattern={name.replace(".", r"\."): ranks[g] for g in own_ranks for name in row.parameters[g]},
        groups=tuple(
            GroupTargets(
                g,
                tuple(found),
                sum(len(shapes) for shapes in found.values()),
                ranks[g],
                sum(_adapter_size(shape, ranks[g]) for shapes in found.values() for shape in shapes),
                sum(math.prod(shape) for shapes in found.values() for shape in shapes),
            )
            for g, found in matched.items()
        ),
        base_parameters=sum(math.prod(p.shape) for n, p in net.named_parameters() if "lora_" not in n),
    )


def _weights(net: nn.Module) -> dict[str, torch.Size]:
    """Names of all parameters and of the modules of Linear weights, each with the weight's shape.

    Names are those of the bare base, also where adapters wrap it already.
    """
    linear = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    shapes = {}
    for name, parameter in net.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if "lora_" not in name:
            shapes[name.replace(".base_layer", "")] = parameter.shape
            if owner in linear and leaf == "weight":
                shapes[owner.replace(".base_layer", "")] = parameter.shape
    return shapes


def _match(
    row: Architecture, group: TargetGroup, weights: dict[str, torch.Size]
) -> dict[str, list[torch.Size]]:
    suffixes = (*row.modules.get(group, ()), *row.parameters.get(group, ()))
    found = {s: [shape for name, shape in weights.items() if name.endswith(f".{s}")] for s in suffixes}
    return {suffix: shapes for suffix, shapes in found.items() if shapes}


def _refuse_groups(
    row: Architecture, matched: dict[TargetGroup, dict[str, list[torch.Size]]], weights: dict[str, torch.Size]
) -> None:
    """Every asked group that can't be adapted, with the reason and those that can."""
    available = ", ".join(g for g in row.groups if _match(row, g, weights))
    problems = [
        f"model.lora.targets: '{group}' of a {row.model_type} model can't be adapted: {row.refused[group]}; "
        f"groups that can: {available}"
        if group in row.refused
        else f"model.lora.targets: '{group}' matches nothing in a {row.model_type} model; "
        f"groups with a match: {available}"
        for group, found in matched.items()
        if not found
    ]
    if problems:
        raise UserError(problems)


def _adapter_size(shape: torch.Size, rank: int) -> int:
    """Parameters of A and B for a weight (out, in) or a stack of experts (experts, ., .)."""
    experts = shape[0] if len(shape) == 3 else 1
    return experts * rank * (shape[-1] + shape[-2])

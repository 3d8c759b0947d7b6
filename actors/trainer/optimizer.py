"""Optimizer and schedule over flat buffers of trainable parameters.

A LoRA has dozens of small tensors. Kept as views of one flat tensor, they are reduced over ranks,
clipped and stepped in one operation each instead of one per tensor. Buffers are bounded, so that
moving a fully trained model into them needs little extra memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actors.models.lora.heads import HEAD_NAME
from actors.models.parallel.fsdp import is_sharded, own_slice
from actors.trainer.parameter_buckets import Bucket
from actors.trainer.process_groups import Ranks
from actors.trainer.spec import OptimSpec

NO_DECAY_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names without weight decay, as in transformers' `Trainer.get_decay_parameter_names`."""


def names_without_decay(model: nn.Module) -> set[str]:
    """Parameters that transformers exempts from weight decay: biases and norms."""
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY_PATTERNS))
    return {name for name, _ in model.named_parameters()} - decayed


def make_optimizer(buckets: Sequence[Bucket], spec: OptimSpec) -> torch.optim.Optimizer:
    """torch's optimizer over buffers; elementwise ones only, for which flat and sliced are exact."""
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        members = [b.flat for b in buckets if b.decays == decays]
        if members:
            groups.append({"params": members, "weight_decay": spec.weight_decay if decays else 0.0})
    if spec.optim == "sgd":
        return torch.optim.SGD(groups, lr=spec.learning_rate)
    return torch.optim.AdamW(
        groups,
        lr=spec.learning_rate,
        betas=(spec.adam_beta1, spec.adam_beta2),
        eps=spec.adam_epsilon,
        fused=spec.optim == "adamw_torch_fused",
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, spec: OptimSpec, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """transformers' schedule; `warmup_steps` below 1 is a share of `total_steps`, rounded up."""
    from transformers.optimization import get_scheduler

    scheduler = get_scheduler(
        spec.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(spec, total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(spec.lr_scheduler_kwargs),
    )
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    return scheduler


def warmup_steps(spec: OptimSpec, total_steps: int) -> int:
    """As transformers' `TrainingArguments.get_warmup_steps`."""
    return int(spec.warmup_steps) if spec.warmup_steps >= 1 else math.ceil(total_steps * spec.warmup_steps)


class GradientCheck:
    """Every trainable parameter must get a gradient: on the first step, or as soon as it can.

    A LoRA's A has an exactly zero gradient while its B is zero (which lasts through warm-up steps at
    rate 0), so A is asked for once B has moved. In the same way everything below a scalar head waits
    while the head is zero.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], ranks: Ranks | None = None) -> None:
        """`ranks`: who holds the other slices of sharded parameters."""
        self._pending = dict(parameters)
        self._all = dict(parameters)
        self._ranks = ranks or Ranks()

    @property
    def pending(self) -> list[str]:
        """Names that have had no gradient yet."""
        return list(self._pending)

    @pending.setter
    def pending(self, names: Collection[str]) -> None:
        self._pending = {name: self._all[name] for name in names}

    def missing(self) -> list[str]:
        """Names that should have had a gradient by now, given the gradients of this step."""
        if not self._pending:
            return []
        got = self._nonzero({name: p.grad for name, p in self._pending.items()})
        self._pending = {n: p for n, p in self._pending.items() if not got[n]}
        awaited = {n: _awaits(n) for n in self._pending}
        moved = self._nonzero({n: self._all.get(n) for n in {HEAD_NAME, *awaited.values()}})
        return [name for name in self._pending if not self._waits(name, awaited[name], moved)]

    def only_behind_routers(self, missing: Collection[str]) -> bool:
        """True if those without a gradient are experts of the last layer or a scalar head, and none of these
        has one: a step of the routers' auxiliary loss alone leaves it so."""
        last = max((_layer(name) for name in self._all), default=-1)
        behind = {
            name: parameter.grad
            for name, parameter in self._all.items()
            if name == HEAD_NAME or (_layer(name) == last and ".experts." in name)
        }
        return set(missing) <= set(behind) and not any(self._nonzero(behind).values())

    def _waits(self, name: str, partner: str, moved: Mapping[str, bool]) -> bool:
        if name != HEAD_NAME and HEAD_NAME in self._all and not moved[HEAD_NAME]:
            return True
        return ".lora_A." in name and partner in self._all and not moved[partner]

    def _nonzero(self, tensors: Mapping[str, Tensor | None]) -> dict[str, bool]:
        """True where a tensor, or its slice on any rank, has an element other than 0."""
        names = sorted(tensors)
        flags = [t is not None and bool(own_slice(t).any()) for t in (tensors[name] for name in names)]
        sharded = [p for p in self._all.values() if is_sharded(p)]
        if sharded:
            counts = torch.tensor(flags, dtype=torch.int32, device=sharded[0].device)
            flags = [bool(x) for x in self._ranks.max_(counts).tolist()]
        return dict(zip(names, flags, strict=True))


def _awaits(name: str) -> str:
    """A LoRA's A gets its first gradient once this has moved."""
    return name.replace(".lora_A.", ".lora_B.")


def _layer(name: str) -> int:
    """Number of the decoder layer that a parameter is in; -1 outside of them."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1

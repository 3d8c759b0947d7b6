"""Bytes of weights, gradients and moments on one rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.cluster import RoleSpec
    from actors.models.facts import BaseSizes, Weight
    from actors.models.spec import LoraSpec, ModelSpec

ADAPTER_BYTES = 4
"""Adapters train and are kept in float32 whatever the base's dtype (`actors.models.lora.targets`)."""
MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}
"""Tensors that an optimizer keeps for each one that it trains, in the same dtype."""


GATHERED_LAYERS, GATHERED_BY_GLOO = 3, 5
"""Layers that are whole at one time, at most; gloo gathers into memory of its own first (by what ranks were
measured to take)."""


@dataclass(frozen=True)
class Holding:
    """A base as one rank of a role holds it."""

    model: ModelSpec
    sharding: str
    ranks: int
    """That the sharding splits it over; 1: none."""
    tensor_parallel: int
    on_gpu: bool

    @staticmethod
    def of(model: ModelSpec, role: RoleSpec) -> Holding:
        split = role.workers if role.sharding != "none" else 1
        return Holding(model, role.sharding, split, role.tensor_parallel_size, role.gpus > 0)

    @property
    def lora(self) -> LoraSpec | None:
        return self.model.lora

    @property
    def element(self) -> int:
        """Bytes of one element of what the base computes with."""
        return 4 if self.model.dtype == "float32" else 2

    @property
    def gathers(self) -> bool:
        """Layers are gathered for each pass (FSDP2)."""
        return self.sharding in ("base", "full") and self.ranks > 1

    @property
    def fused_experts(self) -> bool:
        """Experts run by `actors.models.moe.grouped_mlp`, which keeps less."""
        return self.element == 4 and self.lora is not None and not self.on_gpu

    def share(self, weight: Weight) -> float:
        """Part of a weight that one rank holds.

        FSDP2 splits every weight by rows; `experts` splits stacks; tensor parallel splits what is inside of
        layers but routers and norms (docs/sharding.md).
        """
        if self.gathers or (self.sharding == "experts" and weight.part == "experts"):
            return 1 / self.ranks
        inside = weight.layer is not None and len(weight.shape) > 1 and weight.part != "router"
        return 1 / self.tensor_parallel if inside else 1.0


def bytes_of_frozen(weight: Weight, holding: Holding) -> float:
    """Bytes of one weight of the base as it lies in memory, of all ranks together.

    The one place that knows what an element of a frozen base takes.
    """
    if weight.quantised_bytes is not None and holding.model.quantization is not None:
        return float(weight.quantised_bytes)
    return float(weight.elements * holding.element)


def dequantised_bytes(sizes: BaseSizes, holding: Holding) -> int:
    """Of weights that are dequantised at one time: on GPUs a stack of experts, on CPUs one expert in float32
    (docs/models-and-moe.md)."""
    small = [w for w in sizes.weights if w.quantised_bytes is not None]
    if holding.model.quantization is None or not small:
        return 0
    if holding.on_gpu:
        return max(w.elements for w in small) * holding.element
    return max(w.elements // (w.shape[0] if len(w.shape) == 3 else 1) for w in small) * 4


def base_bytes(sizes: BaseSizes, holding: Holding) -> int:
    """Of the base on one rank."""
    return int(sum(bytes_of_frozen(w, holding) * holding.share(w) for w in sizes.weights))


def adapter_bytes(sizes: BaseSizes, holding: Holding) -> int:
    """Of one adapter on one rank; `sharding: full` splits it too."""
    whole = sizes.adapter_elements(holding.lora) * ADAPTER_BYTES
    return whole // holding.ranks if holding.sharding == "full" else whole


def trained_bytes(sizes: BaseSizes, holding: Holding) -> int:
    """Of what one role trains on one rank: an adapter, or without LoRA the base in its dtype."""
    return base_bytes(sizes, holding) if holding.lora is None else adapter_bytes(sizes, holding)


def gathered_bytes(sizes: BaseSizes, holding: Holding, at_head: bool = False) -> int:
    """Of layers that FSDP2 holds whole at one time, at most: the one that runs, the next one on its way, and
    the buffer that it comes in (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py); and embedding and
    output head, groups of their own. `at_head`: while the head makes logits, when no layer is there."""
    if not holding.gathers:
        return 0
    ends = _of((w for w in sizes.weights if w.part in ("head", "embedding")), holding)
    if at_head:
        return int(ends)
    layer = max((_of(layer.weights, holding) for layer in sizes.layers), default=0.0)
    return int((GATHERED_LAYERS if holding.on_gpu else GATHERED_BY_GLOO) * layer + ends)


def _of(weights: Iterable[Weight], holding: Holding) -> float:
    return sum(bytes_of_frozen(w, holding) for w in weights)


def largest_gradient(sizes: BaseSizes, holding: Holding) -> int:
    """Of one weight inside a layer, whose gradient autograd makes before it is added to the one that is kept.
    Without LoRA only; an adapter's are small."""
    if holding.lora is not None:
        return 0
    inside = [bytes_of_frozen(w, holding) * holding.share(w) for w in sizes.weights if w.layer is not None]
    return int(max(inside, default=0.0))

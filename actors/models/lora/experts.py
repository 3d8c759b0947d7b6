"""Unmerged LoRA on experts: y = x W^T + s (x A^T) B^T, per expert, with the grouped product.

PEFT adapts a stack of experts by materialising W + s B A for all of them in every forward, and by
back-propagating a gradient of the stack's full size. Here the low-rank term is a product of its own,
added to transformers' grouped expert product. Parameters, names and files stay PEFT's, so adapters go
both ways, and with the adapter off the outputs are those of the base's own code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.functional import pad
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from actors.errors import UserError
from actors.models.lora.linear import wrap_linears
from actors.models.moe.expert_parallel import is_split
from actors.models.moe.experts_forward import _FACTORS, UNMERGED, _experts_forward
from actors.models.parallel.fsdp import own_part, split_dims
from actors.models.quantization.quantised_tensor import QuantisedTensor

if TYPE_CHECKING:
    from peft import PeftModel


def select(peft: PeftModel, impl: str) -> str:
    """Let expert LoRA run `unmerged` or as in `peft`; `auto` decides. Returns the choice.

    Raises:
        UserError: `unmerged` was asked for with another experts implementation than grouped_mm, or `peft` for
            experts that are split among ranks or quantised.
    """
    wrap_linears(peft)
    base = peft.get_base_model()
    now = getattr(base.config, "_experts_implementation", None)
    stacks = [m for m in peft.modules() if isinstance(m, ParamWrapper) and m.num_experts > 1]
    if not stacks:
        return "peft"
    split = any(is_split(m.get_base_layer()) for m in stacks)
    if split and (impl == "peft" or now not in ("grouped_mm", UNMERGED)):
        raise UserError(
            "model.lora: experts that ranks share out have unmerged LoRA only, with which each rank computes "
            "its own; set model.lora.expert_impl: auto and model.moe.experts_implementation: grouped_mm"
        )
    small = any(isinstance(m.get_param(), QuantisedTensor) for m in stacks)
    if small and (impl == "peft" or now not in ("grouped_mm", UNMERGED)):
        raise UserError(
            "model.lora: experts that are quantised have unmerged LoRA only, as PEFT's W + BA is a layer of "
            "experts in 16 or 32 bits; set model.lora.expert_impl: auto and "
            "model.moe.experts_implementation: grouped_mm"
        )
    if impl == "peft":
        if now == UNMERGED:
            base.set_experts_implementation("grouped_mm")
        return "peft"
    if now not in ("grouped_mm", UNMERGED):
        if impl == "unmerged":
            raise UserError(
                "model.lora.expert_impl: 'unmerged' needs moe.experts_implementation: grouped_mm, "
                f"not '{now}'"
            )
        return "peft"
    if impl == "auto" and not (split or small) and not unmerged_is_faster(stacks[0].get_param()):
        return select(peft, "peft")
    base.set_experts_implementation(UNMERGED)
    wrap_experts(peft)
    return "unmerged"


def unmerged_is_faster(experts: torch.Tensor) -> bool:
    """The `auto` rule, for a stack of experts (experts, ., .).

    CPU time of PEFT's way over this one, forward and backward, one thread: float32 1.02 (8 experts,
    hidden 128, 1,536 tokens), 1.17 (128 tokens), 1.38 (64 experts, hidden 512, 2,048 tokens), 2.3 (256
    tokens); bfloat16 0.97, 0.91 and 1.36 for the first, third and fourth. CUDA was not measured: there
    PEFT's W + BA costs memory for a second copy of every layer's experts.
    """
    return experts.device.type == "cuda" or experts.dtype == torch.float32


def wrap_experts(peft: PeftModel) -> None:
    """Let every expert stack run unmerged, if that was selected; needed again after adding adapters. Linear
    layers run fused in any case."""
    wrap_linears(peft)
    if getattr(peft.get_base_model().config, "_experts_implementation", None) != UNMERGED:
        return
    for module in peft.modules():
        if type(module) is ParamWrapper and module.num_experts > 1:
            module.__class__ = _UnmergedParamWrapper


class _UnmergedParamWrapper(ParamWrapper):
    """PEFT's wrapper of one stacked parameter, which hands A and B down instead of W + s B A."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        experts = self.get_base_layer()
        active = [a for a in self.active_adapters if a in self.lora_A]
        unmerged = experts.config._experts_implementation == UNMERGED
        if self.disable_adapters or self.merged or not active or not unmerged:
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        factors = experts.__dict__.setdefault(_FACTORS, {})
        factors[self.parameter_name] = [self._factors(a) for a in active]
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            factors.pop(self.parameter_name, None)

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        # PEFT's layouts: A (experts * r, in) with the expert slowest, B (out, r * experts) with it fastest.
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        dtype = self.get_param().dtype
        stacked_a = a.reshape(self.num_experts, -1, a.shape[-1])
        stacked_b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        stacked_a, stacked_b = own_factors(self.get_param(), stacked_a, stacked_b)
        stacked_a, stacked_b = stacked_a.to(dtype), stacked_b.contiguous().to(dtype)
        # grouped_mm refuses rows that are no multiple of 16 bytes: fill the rank up with zeros.
        if fill := -stacked_a.shape[1] % (16 // dtype.itemsize):
            stacked_a, stacked_b = pad(stacked_a, (0, 0, 0, fill)), pad(stacked_b, (0, fill))
        return stacked_a, stacked_b, self.scaling[adapter]


def own_factors(stack: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of A (experts, r, in) and B (experts, out, r) that belong to this rank's part of a stack of
    experts (experts, out, in): some experts, rows or columns of it; all of both where it is whole."""
    dims = split_dims(stack)
    by_a, by_b = dims <= {0, 2}, dims <= {0, 1}
    return own_part(a, stack) if by_a else a, own_part(b, stack) if by_b else b


# PEFT recognises its wrappers by class name when it adds or loads a further adapter.
_UnmergedParamWrapper.__name__ = "ParamWrapper"


ALL_EXPERTS_FUNCTIONS.register(UNMERGED, _experts_forward)

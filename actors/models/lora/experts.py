"""LoRA on experts beside the grouped product: y = x W^T + s (x A^T) B^T, per expert.

PEFT adapts a stack of experts by materialising W + s B A for all of them in every forward, and by
back-propagating a gradient of the stack's full size. Here the low-rank term is computed next to
transformers' grouped expert product instead. Parameters, names and files stay PEFT's, so adapters go
both ways, and with the adapter off the outputs are those of the base's own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.functional import pad
from transformers.activations import SiLUActivation
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    _grouped_linear,
    grouped_mm_experts_forward,
)

from actors.errors import UserError
from actors.models.lora.linear import wrap_linears
from actors.models.moe.grouped_mlp import LowRank, Routes, expert_mlp
from actors.models.moe.token_dispatch import OwnExperts, Travel
from actors.models.parallel.fsdp import is_managed, is_sharded, own_part, split_dims

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BESIDE = "grouped_mm_lora_beside"
"""Name of the experts implementation registered with transformers."""
_FACTORS = "_raylign_lora_factors"
_WANTED = "_raylign_wanted_tokens"

Factors = list[tuple[torch.Tensor, torch.Tensor, float]]
"""Per active adapter: A (experts, r, in), B (experts, out, r), scaling."""


def select(peft: PeftModel, impl: str) -> str:
    """Make expert LoRA run `beside` or in `peft`'s way; `auto` decides. Returns the choice.

    Raises:
        UserError: `beside` was asked for with another experts implementation than grouped_mm, or `peft` for
            experts that are split among ranks.
    """
    wrap_linears(peft)
    base = peft.get_base_model()
    now = getattr(base.config, "_experts_implementation", None)
    stacks = [m for m in peft.modules() if isinstance(m, ParamWrapper) and m.num_experts > 1]
    if not stacks:
        return "peft"
    # What fully_shard splits is whole again in every pass.
    split = not is_managed(base) and any(is_sharded(m.get_param()) for m in stacks)
    if split and (impl == "peft" or now not in ("grouped_mm", BESIDE)):
        raise UserError(
            "model.lora: experts that ranks share out have LoRA beside the product only, where each computes "
            "with its own; set model.lora.expert_impl: auto and model.moe.experts_implementation: grouped_mm"
        )
    if impl == "peft":
        if now == BESIDE:
            base.set_experts_implementation("grouped_mm")
        return "peft"
    if now not in ("grouped_mm", BESIDE):
        if impl == "beside":
            raise UserError(
                f"model.lora.expert_impl: 'beside' needs moe.experts_implementation: grouped_mm, not '{now}'"
            )
        return "peft"
    if impl == "auto" and not split and not beside_is_faster(stacks[0].get_param()):
        return select(peft, "peft")
    base.set_experts_implementation(BESIDE)
    wrap_experts(peft)
    return "beside"


def use_fused(model: PreTrainedModel) -> None:
    """Run frozen experts by the fused MLP without LoRA too, where it runs with LoRA: a bare base then has the
    bits of a policy whose adapter is off."""
    grouped = getattr(model.config, "_experts_implementation", None) == "grouped_mm"
    if not grouped or not model._can_set_experts_implementation():
        return
    if model.device.type == "cpu" and model.dtype == torch.float32:
        model.set_experts_implementation(BESIDE)


def beside_is_faster(experts: torch.Tensor) -> bool:
    """The `auto` rule, for a stack of experts (experts, ., .).

    CPU time of PEFT's way over this one, forward and backward, one thread: float32 1.02 (8 experts,
    hidden 128, 1,536 tokens), 1.17 (128 tokens), 1.38 (64 experts, hidden 512, 2,048 tokens), 2.3 (256
    tokens); bfloat16 0.97, 0.91 and 1.36 for the first, third and fourth. CUDA was not measured: there
    PEFT's W + BA costs memory for a second copy of every layer's experts.
    """
    return experts.device.type == "cuda" or experts.dtype == torch.float32


def wrap_experts(peft: PeftModel) -> None:
    """Let every expert stack run beside, if that was selected; needed again after adding adapters. Linear
    layers run fused in any case."""
    wrap_linears(peft)
    if getattr(peft.get_base_model().config, "_experts_implementation", None) != BESIDE:
        return
    for module in peft.modules():
        if type(module) is ParamWrapper and module.num_experts > 1:
            module.__class__ = _BesideParamWrapper


class _BesideParamWrapper(ParamWrapper):
    """PEFT's wrapper of one stacked parameter, which hands A and B down instead of W + s B A."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        experts = self.get_base_layer()
        active = [a for a in self.active_adapters if a in self.lora_A]
        beside = experts.config._experts_implementation == BESIDE
        if self.disable_adapters or self.merged or not active or not beside:
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
    """Of A (experts, r, in) and B (experts, out, r) what belongs to this rank's part of a stack of experts
    (experts, out, in): some experts, rows or columns of it; all of both where it is whole."""
    dims = split_dims(stack)
    by_a, by_b = dims <= {0, 2}, dims <= {0, 1}
    return own_part(a, stack) if by_a else a, own_part(b, stack) if by_b else b


# PEFT recognises its wrappers by class name when it adds or loads a further adapter.
_BesideParamWrapper.__name__ = "ParamWrapper"


def _experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' grouped expert product with low-rank terms beside it.

    Shapes: hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) -> (tokens, hidden).
    On the CPU by a function of our own (actors/models/moe/grouped_mlp.py). Elsewhere in the order of operations of
    `grouped_mm_experts_forward`, to which it hands over without LoRA.
    """
    factors: dict[str, Factors] = self.__dict__.get(_FACTORS) or {}
    if is_sharded(self.down_proj):
        return _over_ranks(self, hidden_states, top_k_index, top_k_weights, factors)
    if _runs_fused(self, hidden_states, top_k_weights, factors):
        routes = Routes.of(top_k_index, self.num_experts, self.__dict__.get(_WANTED))
        return _fused_forward(self, hidden_states, top_k_weights, routes, factors)
    return _grouped_forward(self, hidden_states, top_k_index, top_k_weights, factors)


def _over_ranks(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    factors: dict[str, Factors],
) -> torch.Tensor:
    """The same with the experts of all ranks, each of which has tokens of its own. Collective."""
    group = self.down_proj.device_mesh.get_group()
    travel = Travel.of(top_k_index, self.num_experts, group, self.__dict__.get(_WANTED))
    rows, weights = travel.out(hidden_states, top_k_weights)
    own: Any = OwnExperts(self)
    if _runs_fused(self, rows, weights, factors):
        routes = Routes.of_some(travel.experts, own.num_experts)
        return travel.back(_fused_forward(own, rows, weights, routes, factors))
    # One choice after the other: within a choice each token is there once, so that sums have one order.
    choice, token = (travel.experts.t() >= 0).nonzero(as_tuple=True)
    expert, weight = travel.experts[token, choice][:, None], weights[token, choice][:, None]
    if len(token):
        found = _grouped_forward(own, rows[token], expert, weight, factors)
    else:
        # No token came. A row of zeros keeps all that wants a gradient, and so the way back, in the graph.
        nothing, no_weight = rows.sum(0, keepdim=True), weights.sum().reshape(1, 1)
        found = _grouped_forward(own, nothing, choice.new_zeros((1, 1)), no_weight, factors)[:0]
    sizes = torch.bincount(choice, minlength=weights.shape[1]).tolist()
    mixed = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
    for at, part in zip(token.split(sizes), found.split(sizes), strict=True):
        mixed.index_add_(0, at, part.to(mixed.dtype))
    return travel.back(mixed.to(rows.dtype)).to(hidden_states.dtype)


def _grouped_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    factors: dict[str, Factors],
) -> torch.Tensor:
    if not factors:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if self._is_expert_parallel:
        raise NotImplementedError("expert LoRA beside the product does not run by transformers' expert plan")
    n_tokens, k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1))
    counted = experts.float() if experts.device.type in ("cpu", "mps") else experts.int()
    counts = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[experts] if self.has_bias else None
        y = _grouped_linear(x, getattr(self, name), ends, bias=bias, is_transposed=self.is_transposed)
        for a, b, scaling in factors.get(name, ()):
            # In place: a second tensor of y's size costs more than the low-rank product itself.
            y.add_(_grouped_linear(_grouped_linear(x, a, ends) * scaling, b, ends))
        return y

    up = linear(hidden_states[order // k], "gate_up_proj" if self.has_gate else "up_proj")
    activated = self._apply_gate(up) if self.has_gate else self.act_fn(up)
    weighted = linear(activated, "down_proj") * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return weighted[back].view(n_tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _runs_fused(
    experts: Any, hidden_states: torch.Tensor, top_k_weights: torch.Tensor, factors: dict[str, Factors]
) -> bool:
    """Frozen float32 experts with SiLU gates on the CPU, one adapter at most."""
    return (
        hidden_states.device.type == "cpu"
        and hidden_states.dtype == top_k_weights.dtype == experts.down_proj.dtype == torch.float32
        and not (experts.has_bias or experts.is_transposed or experts._is_expert_parallel)
        and experts.has_gate
        and experts.is_concatenated
        and type(experts)._apply_gate is _default_apply_gate
        and isinstance(experts.act_fn, nn.SiLU | SiLUActivation)
        and not (experts.down_proj.requires_grad or experts.gate_up_proj.requires_grad)
        and all(len(found) == 1 for found in factors.values())
    )


def _fused_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor,
    routes: Routes,
    factors: dict[str, Factors],
) -> torch.Tensor:
    """The same without LoRA too: a reference whose adapter is off then equals its policy to the bit."""
    beside = [LowRank(*factors[n][0]) if n in factors else None for n in ("gate_up_proj", "down_proj")]
    return expert_mlp(hidden_states, top_k_weights, self.gate_up_proj, self.down_proj, routes, *beside)


def last_experts(model: PreTrainedModel) -> nn.Module | None:
    """The experts of a model's last layer, behind which tokens have nothing to do with each other; None where
    that layer has none."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    found = [m for m in layers[-1].modules() if getattr(getattr(m, "down_proj", None), "ndim", 0) == 3]
    return found[0] if len(found) == 1 else None


@contextmanager
def only(experts: nn.Module | None, tokens: torch.Tensor) -> Iterator[None]:
    """Let `experts` leave out all tokens but these (int64, each once), where they run fused on the CPU.

    Theirs is then zero in place of a value that nobody reads. Backward passes need nothing of this.
    """
    if experts is None:
        yield
        return
    experts.__dict__[_WANTED] = tokens
    try:
        yield
    finally:
        experts.__dict__.pop(_WANTED, None)


ALL_EXPERTS_FUNCTIONS.register(BESIDE, _experts_forward)

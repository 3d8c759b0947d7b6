"""Forward pass of stacked experts with unmerged LoRA factors, registered with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import (
    _default_apply_gate,
    _grouped_linear,
    grouped_mm_experts_forward,
)

from actors.models.moe.grouped_mlp import LowRank, Routes, expert_mlp
from actors.models.moe.token_dispatch import OwnExperts, TokenDispatch
from actors.models.parallel.fsdp import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


UNMERGED = "grouped_mm_lora_unmerged"
"""Name of the experts implementation registered with transformers."""


_FACTORS = "_raylign_lora_factors"


_WANTED = "_raylign_wanted_tokens"


Factors = list[tuple[torch.Tensor, torch.Tensor, float]]
"""Per active adapter: A (experts, r, in), B (experts, out, r), scaling."""


def use_fused(model: PreTrainedModel) -> None:
    """Run frozen experts by the fused MLP without LoRA too, where it runs with LoRA: a bare base then has the
    bits of a policy whose adapter is off."""
    grouped = getattr(model.config, "_experts_implementation", None) == "grouped_mm"
    if not grouped or not model._can_set_experts_implementation():
        return
    if model.device.type == "cpu" and model.dtype == torch.float32:
        model.set_experts_implementation(UNMERGED)


def _experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' grouped expert product plus the low-rank terms of LoRA, unmerged.

    Shapes: hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) -> (tokens, hidden).
    On the CPU by a function of our own (actors/models/moe/grouped_mlp.py). Elsewhere in the order of
    operations of `grouped_mm_experts_forward`, to which it hands over without LoRA.
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
    dispatch = TokenDispatch.of(top_k_index, self.num_experts, group, self.__dict__.get(_WANTED))
    rows, weights = dispatch.send(hidden_states, top_k_weights)
    own: Any = OwnExperts(self)
    if _runs_fused(self, rows, weights, factors):
        routes = Routes.of_some(dispatch.experts, own.num_experts)
        return dispatch.combine(_fused_forward(own, rows, weights, routes, factors))
    # One choice after the other: within a choice each token is there once, so that sums have one order.
    choice, token = (dispatch.experts.t() >= 0).nonzero(as_tuple=True)
    expert, weight = dispatch.experts[token, choice][:, None], weights[token, choice][:, None]
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
    return dispatch.combine(mixed.to(rows.dtype)).to(hidden_states.dtype)


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
        raise NotImplementedError("unmerged expert LoRA does not run by transformers' expert plan")
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
    lora = [LowRank(*factors[n][0]) if n in factors else None for n in ("gate_up_proj", "down_proj")]
    return expert_mlp(hidden_states, top_k_weights, self.gate_up_proj, self.down_proj, routes, *lora)


def last_experts(model: PreTrainedModel) -> nn.Module | None:
    """The experts of a model's last layer, behind which no token depends on another; None where that layer
    has none."""
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

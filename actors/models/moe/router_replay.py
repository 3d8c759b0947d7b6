"""Rollout routing replay: the trainer computes samples with the experts that the engine chose for them.

Engine and trainer hold the same weights but round differently, and where two experts are nearly as good for a
token, rounding decides: then they compute with different experts, and their log-probabilities differ much.
With the engine's choice forced on the trainer, only differences of rounding remain (arXiv 2510.11370). Only
the choice is replayed: the gates that weigh the chosen experts are computed from the trainer's own logits, by
the architecture's own function, and gradients flow through them into the router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from actors.errors import InvariantViolation, UserError
from actors.models.architectures.lookup import architecture_of, replay_problem
from actors.models.architectures.row import GateKind
from actors.models.moe.router_stats import routers_of

Gates = Callable[[Tensor, Tensor, PretrainedConfig], Tensor]
"""(logits (tokens, experts), chosen (tokens, top_k), config) -> gates (tokens, top_k)."""


def _softmax(logits: Tensor, chosen: Tensor, config: PretrainedConfig) -> Tensor:
    """Probabilities over all experts, divided by their sum where the config says so."""
    gates = _probabilities(logits, chosen)
    return gates / gates.sum(dim=-1, keepdim=True) if config.norm_topk_prob else gates


def _scaled_softmax(logits: Tensor, chosen: Tensor, config: PretrainedConfig) -> Tensor:
    """DeepSeek-V2's: probabilities over all experts times a factor; transformers never divides them."""
    return _probabilities(logits, chosen) * config.routed_scaling_factor


def _normalised_softmax(logits: Tensor, chosen: Tensor, config: PretrainedConfig) -> Tensor:
    gates = _probabilities(logits, chosen)
    return gates / gates.sum(dim=-1, keepdim=True)


def _floored_softmax(logits: Tensor, chosen: Tensor, config: PretrainedConfig) -> Tensor:
    """ERNIE's: divided by their sum, which counts as `moe_norm_min` at least."""
    gates = _probabilities(logits, chosen)
    return gates / gates.sum(dim=-1, keepdim=True).clamp(min=config.moe_norm_min)


def _softmax_of_chosen(logits: Tensor, chosen: Tensor, config: PretrainedConfig) -> Tensor:
    """Probabilities over the chosen experts' logits."""
    return torch.softmax(logits.gather(1, chosen), dim=-1)


def _scaled_sigmoid(logits: Tensor, chosen: Tensor, config: PretrainedConfig) -> Tensor:
    """DeepSeek-V3's: the correction bias changes the choice, but not the gates (arXiv 2412.19437, eq. 16)."""
    gates = logits.sigmoid().gather(1, chosen)
    if config.norm_topk_prob:
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
    return gates * config.routed_scaling_factor


def _normalised_sigmoid(logits: Tensor, chosen: Tensor, config: PretrainedConfig) -> Tensor:
    """MiniMax-M2's: DeepSeek-V3's, always divided by their sum and never scaled."""
    gates = logits.float().sigmoid().gather(1, chosen)
    return gates / gates.sum(dim=-1, keepdim=True)


def _probabilities(logits: Tensor, chosen: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.float).gather(1, chosen)


GATES: Mapping[GateKind, Gates] = {
    "softmax": _softmax,
    "scaled_softmax": _scaled_softmax,
    "normalised_softmax": _normalised_softmax,
    "floored_softmax": _floored_softmax,
    "softmax_of_chosen": _softmax_of_chosen,
    "scaled_sigmoid": _scaled_sigmoid,
    "normalised_sigmoid": _normalised_sigmoid,
}
"""Value of `Router.gates` -> function."""


class RouteReplay:
    """Forces experts on the routers of one model."""

    def __init__(self, model: nn.Module) -> None:
        """Listen to the routers of `model` (plain or wrapped by PEFT).

        Raises:
            UserError: this architecture's routes can't be replayed.
        """
        self._config: Any = model.config
        row = architecture_of(self._config)
        if row.router is None or row.router.gates is None:
            raise UserError(f"model.moe.router_replay: 'rollout', but {replay_problem(row.model_type)}")
        self.top_k = row.top_k(self._config)
        self._gates, self._router = GATES[row.router.gates], row.router
        self._experts: Tensor | None = None
        self._device = next(model.parameters()).device
        routers = routers_of(model, row.router.module)
        self.n_layers = len(routers)
        for layer, module in enumerate(routers.values()):
            # Before all other hooks: those that count routes must see the replayed ones.
            module.register_forward_hook(self._hook(layer), prepend=True)
        self.reset()

    def force(self, experts: np.ndarray | None) -> None:
        """Set the experts of the next forward pass, and of a backward pass after it that recomputes layers.

        Args:
            experts: int64 (tokens, layers, top_k), in the order of the model's input; negative where the
                router chooses. None: it chooses everywhere.

        Raises:
            InvariantViolation: layers or experts per token are not those of the model.
        """
        self._experts = None if experts is None else self._checked(experts)

    def reset(self) -> None:
        """Set the counts of `agreement` to 0; forward passes without gradient are counted."""
        self._agreed, self._given = [0.0] * self.n_layers, 0

    def totals(self) -> Tensor:
        """float64 (layers + 1,): choices in common by layer, and choices per layer; ranks add them up."""
        common = [torch.as_tensor(x, dtype=torch.float64, device=self._device) for x in self._agreed]
        given = torch.tensor(self._given, dtype=torch.float64, device=self._device)
        return torch.stack([*common, given])

    @staticmethod
    def agreement(totals: Tensor) -> np.ndarray:
        """float64 (layers,): share of the given experts that the model's routers would have chosen too."""
        found = totals.cpu().numpy()
        return found[:-1] / max(found[-1], 1.0)

    def _checked(self, experts: np.ndarray) -> Tensor:
        if experts.shape[1:] != (self.n_layers, self.top_k):
            raise InvariantViolation(
                "policy",
                "router replay",
                f"the engine has {experts.shape[1]} layers with {experts.shape[2]} experts a token, the "
                f"trainer {self.n_layers} with {self.top_k}",
                "report this",
            )
        return torch.from_numpy(experts).to(self._device)

    def _hook(self, layer: int) -> Any:
        logits_at, experts_at = self._router.logits_at, self._router.experts_at
        assert logits_at is not None
        assert experts_at is not None
        (gates_at,) = {0, 1, 2} - {logits_at, experts_at}

        def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
            if self._experts is None:
                return None
            logits, own = output[logits_at], output[experts_at]
            given = self._experts[:, layer]
            chosen = torch.where(given < 0, own, given)
            if not torch.is_grad_enabled():
                self._count(layer, given, own)
            found = list(output)
            found[experts_at] = chosen
            found[gates_at] = self._gates(logits, chosen, self._config).to(output[gates_at].dtype)
            return tuple(found)

        return replace

    def _count(self, layer: int, given: Tensor, own: Tensor) -> None:
        common = (given[:, :, None] == own[:, None, :]).any(dim=-1).sum(dtype=torch.float64)
        self._agreed[layer] = self._agreed[layer] + common
        if layer == 0:
            self._given += int((given >= 0).sum())

"""Statistics of the routers: load per layer and expert, entropy; and the auxiliary loss where they train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from actors.errors import UserError
from actors.models.architectures.lookup import architecture_of
from actors.models.architectures.row import config_value
from actors.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class RouterLoad:
    """Routing over some tokens, summed over ranks and micro-batches."""

    load: np.ndarray
    """int64 (layers, experts): tokens that chose each expert."""
    entropy_sum: np.ndarray
    """float64 (layers,): routing entropy in nats, summed over tokens."""
    tokens: int
    """Tokens counted (padding is not)."""

    @property
    def max_violation(self) -> np.ndarray:
        """float64 (layers,): MaxVio = (max load - mean load) / mean load (arXiv 2408.15664)."""
        mean = self.load.mean(axis=1)
        return np.divide(self.load.max(axis=1) - mean, mean, out=np.zeros_like(mean), where=mean > 0)

    def metrics(self) -> dict[str, float]:
        """`moe/maxvio` (mean over layers), `moe/maxvio_worst`, `moe/dead_experts`, `moe/entropy`.

        Dead experts are counted per layer and summed: experts that no counted token chose.
        """
        if not self.tokens:
            return {}
        return {
            "moe/maxvio": float(self.max_violation.mean()),
            "moe/maxvio_worst": float(self.max_violation.max()),
            "moe/dead_experts": float((self.load == 0).sum()),
            "moe/entropy": float(self.entropy_sum.mean() / self.tokens),
        }


class RouterStats:
    """Listens to every router of a model by forward hooks; counts only inside `collecting`."""

    def __init__(self, model: nn.Module) -> None:
        """Hook the routers of `model` (plain or wrapped by PEFT); a dense model has none."""
        config: Any = model.config
        row = architecture_of(config)
        self.router = row.router
        self.n_experts, self.top_k = row.n_experts(config), row.top_k(config)
        self.layers: list[str] = []
        self._counted: torch.Tensor | None = None
        self._copies: torch.Tensor | None = None
        self._kept: list[torch.Tensor] | None = None
        self._active = False
        routers = routers_of(model, self.router.module) if self.router else {}
        for index, (name, module) in enumerate(routers.items()):
            self.layers.append(name)
            module.register_forward_hook(self._hook(index))
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self._load: list[torch.Tensor | None] = [None] * len(self.layers)
        self._entropy: list[torch.Tensor | None] = [None] * len(self.layers)
        self._tokens: torch.Tensor | int = 0

    @contextmanager
    def collecting(
        self,
        counted: torch.Tensor | None = None,
        keep_logits: bool = False,
        copies: torch.Tensor | None = None,
    ) -> Iterator[list[torch.Tensor]]:
        """Count the forward passes inside; yields the list that router logits are kept in.

        Args:
            counted: bool, any shape of (tokens) in the order of the model's input: False for padding.
            keep_logits: keep each layer's logits (counted tokens, experts), with gradient, for `aux_loss`.
            copies: int64 (tokens), instead of `counted`: how often each token counts, of which the input has
                one only.
        """
        before = self._counted, self._copies, self._kept, self._active
        kept: list[torch.Tensor] = []
        self._counted = None if counted is None else counted.reshape(-1)
        self._copies = copies
        self._kept, self._active = (kept if keep_logits else None), bool(self.layers)
        try:
            yield kept
            if self._counted is not None:
                kept[:] = [logits[self._counted] for logits in kept]
        finally:
            self._counted, self._copies, self._kept, self._active = before

    def totals(self) -> torch.Tensor:
        """float64 (layers * (experts + 1) + 1,): what ranks add up with one all-reduce."""
        device = next((x.device for x in self._load if x is not None), torch.device("cpu"))
        flat = torch.zeros(len(self.layers) * (self.n_experts + 1) + 1, dtype=torch.float64, device=device)
        for i, (load, entropy) in enumerate(zip(self._load, self._entropy)):
            if load is not None and entropy is not None:
                flat[i * self.n_experts : (i + 1) * self.n_experts] = load
                flat[len(self.layers) * self.n_experts + i] = entropy
        flat[-1] = self._tokens / max(len(self.layers), 1)
        return flat

    def read(self, totals: torch.Tensor | None = None) -> RouterLoad:
        """The counts, from (all-reduced) `totals` or from this process alone."""
        flat = (self.totals() if totals is None else totals).cpu().numpy()
        split = len(self.layers) * self.n_experts
        load = flat[:split].reshape(len(self.layers), self.n_experts)
        return RouterLoad(np.rint(load).astype(np.int64), flat[split:-1].copy(), int(np.rint(flat[-1])))

    def _hook(self, index: int) -> Any:
        assert self.router is not None
        router = self.router

        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._active:
                return
            logits, chosen = router.read(output, self.top_k)
            logits, chosen = logits.reshape(-1, self.n_experts), chosen.reshape(-1, self.top_k)
            # Nothing here may save a tensor for the backward pass: under gradient checkpointing the layer
            # runs again without this hook, and torch refuses a different number of saved tensors.
            if self._kept is not None:
                self._kept.append(logits)
            with torch.no_grad():
                if self._counted is not None:
                    logits, chosen = logits[self._counted], chosen[self._counted]
                times = None if self._copies is None else self._copies.double()
                weights = None if times is None else times.repeat_interleave(self.top_k)
                load = torch.bincount(chosen.reshape(-1), weights, minlength=self.n_experts)
                of_tokens = _entropy(logits.detach(), router.score).double()
                entropy = (of_tokens if times is None else of_tokens * times).sum()
                old, old_entropy = self._load[index], self._entropy[index]
                self._load[index] = load if old is None else old + load
                self._entropy[index] = entropy if old_entropy is None else old_entropy + entropy
                self._tokens = self._tokens + (len(chosen) if times is None else times.sum())

        return count


def aux_loss(
    router_logits: Sequence[torch.Tensor], top_k: int, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Switch load-balancing loss over all layers (arXiv 2101.03961, eq. 4-6), as transformers has it.

    Uniform routing gives `top_k`. Not linear in the batch: the loss of a batch is not the mean of its
    micro-batches' losses.

    Args:
        router_logits: per layer (tokens, experts); from `RouterStats.collecting(keep_logits=True)`
            padding is already left out.
        counted: bool (tokens), to leave rows out here instead.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rows = [x if counted is None else x[counted.reshape(-1)] for x in router_logits]
    return load_balancing_loss_func(tuple(rows), rows[0].shape[-1], top_k)


def aux_loss_coef(spec: ModelSpec, config: PretrainedConfig) -> float:
    """Weight of the auxiliary loss: the configured one, else the base's own where the router trains.

    Raises:
        UserError: a weight was asked for on an architecture that defines no such loss.
    """
    row = architecture_of(config)
    asked = spec.moe.router_aux_loss_coef
    defined = row.router is not None and row.router.has_aux_loss
    if asked and not defined:
        raise UserError(
            f"model.moe.router_aux_loss_coef: {asked}, but a {config.model_type} model has no such loss"
        )
    if asked is not None:
        return asked
    trains = spec.lora is None or "router" in spec.lora.targets
    return float(config_value(config, row.aux_loss_key, 0.0)) if defined and trains else 0.0


def make_routing_deterministic(model: nn.Module) -> None:
    """Let training choose the experts that evaluation and generation choose.

    In training mode some families draw experts at random (phimoe) or multiply the router's input by noise
    (a config's jitter). The log-probability that an update starts from would then not be the one that was
    recorded, and the policy not the one that sampled.
    """
    router = architecture_of(model.config).router
    for module in model.modules():
        for noise in _NOISE:
            if getattr(module, noise, None):
                setattr(module, noise, 0.0 if noise != "moe_jitter_eps" else None)
    if router is not None and router.samples_in_training:
        for module in routers_of(model, router.module).values():
            module.register_forward_pre_hook(_evaluate)


_NOISE = ("input_jitter_noise", "jitter_noise", "moe_jitter_eps")
"""Attributes of blocks and routers. Not `router_jitter_noise`: phimoe's is a threshold, in evaluation too."""


def _evaluate(module: nn.Module, _: Any) -> None:
    module.training = False


def routers_of(model: nn.Module, suffix: str) -> dict[str, nn.Module]:
    """Layer name -> the router itself, inside any LoRA wrapper."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.named_modules():
        bare = name.replace(".base_layer", "")
        if bare.endswith(f".{suffix}") and not isinstance(module, BaseTunerLayer):
            found[bare] = module
    return found


def _entropy(logits: torch.Tensor, score: str) -> torch.Tensor:
    """(tokens,): entropy in nats of the routing probabilities."""
    logits = logits.float()
    if score == "softmax":
        log_p = logits.log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1)
    weights = logits.sigmoid()
    p = weights / weights.sum(dim=-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(dim=-1)

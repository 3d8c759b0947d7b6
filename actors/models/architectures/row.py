"""The type of a row in the table of architectures: names of LoRA targets, the router, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from actors.errors import UserError
from actors.models.spec import TargetGroup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

Attention = Literal["sdpa", "eager"]
Packs = Literal["bins", "padding_free", "no"]
GateKind = Literal[
    "softmax",
    "scaled_softmax",
    "normalised_softmax",
    "floored_softmax",
    "softmax_of_chosen",
    "scaled_sigmoid",
    "normalised_sigmoid",
]
"""Keys of `actors.models.moe.router_replay.GATES`."""


@dataclass(frozen=True)
class Router:
    """The router of a mixture-of-experts block: its module, and where its output holds logits and experts."""

    module: str
    """Suffix of the router module's name, e.g. `mlp.gate`."""
    logits_at: int | None = 0
    """Index of the logits (tokens, experts) in the tuple that the router returns; None: it returns them."""
    experts_at: int | None = 2
    """Index of the chosen experts (tokens, top_k) in that tuple; None: those with the largest logits."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Function from logits to routing probabilities."""
    has_aux_loss: bool = True
    """transformers defines the Switch load-balancing loss for it (others balance by a bias)."""
    samples_in_training: bool = False
    """In training mode transformers samples experts at random; such routers are kept in evaluation mode."""
    gates: GateKind | None = None
    """Function from logits to the gates of the chosen experts, by which routes are replayed
    (`actors.models.moe.router_replay`): for modules that return logits, gates and experts, where engines were
    seen to report their experts. None: no replay."""
    why_no_replay: str = ""
    """The reason where routes can't be replayed."""

    def read(self, output: Any, top_k: int) -> tuple[Tensor, Tensor]:
        """(logits, chosen experts) in what the router module returned, shapes as it has them."""
        logits = output if self.logits_at is None else output[self.logits_at]
        if self.experts_at is not None:
            return logits, output[self.experts_at]
        return logits, logits.detach().topk(top_k, dim=-1).indices


@dataclass(frozen=True)
class Architecture:
    """One row of the table. Names are suffixes of names in transformers, as PEFT matches them."""

    model_type: str
    modules: Mapping[TargetGroup, tuple[str, ...]]
    """Target group -> suffixes of `nn.Linear` modules (PEFT's `target_modules`)."""
    parameters: Mapping[TargetGroup, tuple[str, ...]] = field(default_factory=dict)
    """Target group -> suffixes of parameters that are no Linear (PEFT's `target_parameters`)."""
    router: Router | None = None
    experts_key: str = "num_experts"
    """Config key of the number of experts, with dots into nested configs."""
    top_k_key: str = "num_experts_per_tok"
    """Config key of the experts per token."""
    aux_loss_key: str = "router_aux_loss_coef"
    """Config key of the load-balancing loss's own weight."""
    packs: Packs = "bins"
    """Form in which sequences may share a row: in `bins`, where position ids that restart keep them apart;
    `padding_free`, only by attention that is told where each begins (`actors.models.attention`); or `no`
    known form."""
    attention: Attention = "sdpa"
    """Implementation that `attn_implementation: sdpa` loads; transformers has no sdpa for attention sinks."""
    grouped_experts: bool = True
    """transformers runs its experts by `moe.experts_implementation`; False: by a loop of its own."""
    shards_by_layer: bool = True
    """transformers has a plan that splits it by layer; False: `sharding` would gather it whole."""
    stages: tuple[str, ...] | None = None
    """Types of the stages it may train in; None: all."""
    why_only: str = ""
    """The reason for that."""
    refused: Mapping[TargetGroup, str] = field(default_factory=dict)
    """Target group that it has but that can't be adapted -> the reason."""
    untrained: tuple[str, ...] = ()
    """Suffixes of parameters that no loss has a gradient for; they don't change when every parameter
    trains."""
    limits: tuple[str, ...] = ()
    """Limits that users should know, a sentence each."""
    twin: Mapping[str, Any] = field(default_factory=dict)
    """Config keys, with dots into nested configs, that the tiny copy of a dry run sets in addition to the
    usual sizes."""
    tested: bool = True
    """False for a row derived from the modules of an unknown architecture."""

    @property
    def is_moe(self) -> bool:
        return self.router is not None

    @property
    def groups(self) -> tuple[TargetGroup, ...]:
        """Target groups that some model of this architecture has."""
        return tuple(dict.fromkeys((*self.modules, *self.parameters)))

    def n_experts(self, config: PretrainedConfig) -> int:
        """Routed experts per layer; 0 for a dense model."""
        return _of_every_layer(config, self.experts_key) if self.is_moe else 0

    def top_k(self, config: PretrainedConfig) -> int:
        """Experts per token; 1 for a dense model."""
        return _of_every_layer(config, self.top_k_key) if self.is_moe else 1


def config_value(config: Any, key: str, default: Any = None) -> Any:
    """The value under a key with dots into nested configs."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
        if config is None:
            return default
    return config


def _of_every_layer(config: Any, key: str) -> int:
    """A number that some configs give once and some once per layer.

    Raises:
        UserError: layers differ in it.
    """
    value = config_value(config, key)
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise UserError(f"model.base: {key} differs between layers ({value}), which is not supported")
        value = value[0]
    return int(value)

"""The architectures that Raylign knows: names of LoRA targets, the router, what may be packed.

One row per transformers `model_type`. Every row is covered by tests that train it, save it, merge it
and, where `packable` is set, compare packed with padded batches. An architecture without a row is
refused with the reason instead of being tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from actors.errors import UserError
from actors.models.spec import TargetGroup

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Router:
    """Where a mixture-of-experts block decides, and how to read its decision."""

    module: str
    """Suffix of the router module's name, e.g. `mlp.gate`."""
    logits_at: int = 0
    """Index of the logits (tokens, experts) in the tuple that the router returns."""
    experts_at: int = 2
    """Index of the chosen experts (tokens, top_k) in that tuple."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become routing probabilities."""
    has_aux_loss: bool = True
    """transformers defines the Switch load-balancing loss for it (others balance by a bias)."""


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
    """Config key of the number of experts."""
    packable: bool = True
    """Sequences that share a row stay apart when position ids restart and no mask is given."""

    @property
    def is_moe(self) -> bool:
        return self.router is not None

    def n_experts(self, config: PretrainedConfig) -> int:
        """Routed experts per layer; 0 for a dense model."""
        return int(getattr(config, self.experts_key)) if self.is_moe else 0

    def top_k(self, config: PretrainedConfig) -> int:
        """Experts per token; 1 for a dense model."""
        return int(config.num_experts_per_tok) if self.is_moe else 1


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def _dense(model_type: str) -> Architecture:
    return Architecture(model_type, {"attention": _ATTENTION, "mlp": _MLP})


def _weights(prefix: str) -> tuple[str, ...]:
    """Linear layers of an MoE family, named as parameters.

    As modules PEFT would take `...gate_proj` for the experts' old name and silently adapt the fused
    experts instead (peft.utils.transformers_weight_conversion). The files have the same tensor names.
    """
    return tuple(f"{prefix}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj"))


_ROWS = (
    _dense("llama"),
    _dense("mistral"),
    _dense("qwen2"),
    _dense("qwen3"),
    Architecture(
        "qwen3_moe",
        {"attention": _ATTENTION},
        {"experts": _EXPERTS, "router": ("mlp.gate.weight",), "mlp": _weights("mlp")},
        Router("mlp.gate"),
    ),
    Architecture(
        "qwen2_moe",
        {"attention": _ATTENTION},
        {
            "experts": _EXPERTS,
            "router": ("mlp.gate.weight",),
            "shared_experts": _weights("mlp.shared_expert"),
            "mlp": _weights("mlp"),
        },
        Router("mlp.gate"),
    ),
    Architecture(
        "mixtral",
        {"attention": _ATTENTION},
        {"experts": _EXPERTS, "router": ("mlp.gate.weight",)},
        Router("mlp.gate"),
        experts_key="num_local_experts",
    ),
    Architecture(
        "olmoe",
        {"attention": _ATTENTION},
        {"experts": _EXPERTS, "router": ("mlp.gate.weight",)},
        Router("mlp.gate"),
    ),
    Architecture(
        "granitemoe",
        {"attention": _ATTENTION},
        {
            "experts": ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
            "router": ("block_sparse_moe.router.weight",),
        },
        Router("block_sparse_moe.router", logits_at=2, experts_at=0),
        experts_key="num_local_experts",
    ),
    Architecture(
        "glm4_moe",
        {"attention": _ATTENTION},
        {
            "experts": _EXPERTS,
            "router": ("mlp.gate.weight",),
            "shared_experts": _weights("mlp.shared_experts"),
            "mlp": _weights("mlp"),
        },
        Router("mlp.gate", score="sigmoid", has_aux_loss=False),
        experts_key="n_routed_experts",
    ),
)

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}

REFUSED: dict[str, str] = {
    "jamba": "its mamba layers carry state across packed rows and vLLM has no CPU kernel for them",
    "dbrx": "PEFT cannot wrap its experts (they read their own parameters by name)",
    "qwen3_next": "its log-probabilities differ between vLLM and transformers for a reason not yet known",
    "switch_transformers": "it is an encoder-decoder and vLLM has no class for it",
    "gpt_oss": "vLLM drops its experts and sinks when weights are reloaded",
    "deepseek_v2": "vLLM's CPU kernels compute its rotary queries wrongly",
    "deepseek_v3": "vLLM's CPU kernels compute its rotary queries wrongly",
    "phimoe": "transformers routes it at random while training, and vLLM drops the bias of its head",
    "ernie4_5_moe": "vLLM's CPU router ignores its correction bias",
    "minimax_m2": "vLLM's CPU router refuses its correction bias",
}
"""Architectures that were tried and are right in one half of the loop only, with the reason."""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row of `config.model_type`.

    Raises:
        UserError: the architecture has no row; the message says why, or lists those that have one.
    """
    problem = unsupported(config.model_type)
    if problem is not None:
        raise UserError(problem)
    return ARCHITECTURES[config.model_type]


def unsupported(model_type: str) -> str | None:
    """Why this architecture can't be used, or None when it can."""
    if model_type in ARCHITECTURES:
        return None
    reason = REFUSED.get(model_type, "it has no tested row in the table of architectures")
    known = ", ".join(sorted(ARCHITECTURES))
    return f"model.base: architecture '{model_type}' is not supported: {reason}. Supported: {known}"

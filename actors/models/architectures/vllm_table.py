"""Settings by which vLLM runs an architecture correctly: one row per transformers `model_type`.

Importable without vLLM.
Every row is covered by tests that bring ten versions of LoRA weights into a running engine and compare its
log-probabilities with transformers, in float32 where vLLM computes in it. Causes and versions of the
workarounds that rows name are in `actors.rollout.vllm.workarounds.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from actors.models.spec import TargetGroup

EngineDtype = Literal["float32", "bfloat16"]
ConfigExtra = Callable[[Any], Any] | str | int | float | bool
"""A value, or a function of the checkpoint's transformers config."""


@dataclass(frozen=True)
class VllmRow:
    """A row of the table: settings of vLLM for one architecture."""

    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    """vLLM's `hf_overrides`: config keys that it is given whatever the checkpoint says."""
    config_extras: Mapping[str, ConfigExtra] = field(default_factory=dict)
    """Config keys that vLLM's class reads and transformers doesn't write: given where they are missing."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of vLLM that an engine on the CPU starts with."""
    attention_backend: str | None = None
    """vLLM's `attention_config.backend` on the CPU; None leaves it to vLLM."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `LLM` on the CPU."""
    workarounds: tuple[str, ...] = ()
    """Names in `actors.rollout.vllm.workarounds.registry.WORKAROUNDS`, applied before the engine is built."""
    dtypes: tuple[EngineDtype, ...] = ("float32", "bfloat16")
    """Dtypes that the engine's kernels compute in on the CPU."""
    transformers_backend: bool = False
    """vLLM has no class of its own for it and runs transformers' modules."""
    supports_lora: bool = True
    """vLLM's class takes LoRA beside its weights (SupportsLoRA)."""
    slots: tuple[TargetGroup, ...] = ()
    """LoRA groups that were seen to be right in slots of vLLM, experts up to their kernel: a CPU has none."""
    note: str = ""
    """A limit that users should know, in one sentence."""

    def overrides_for(self, config: Any) -> dict[str, Any]:
        """vLLM's `hf_overrides` for a checkpoint with this transformers config."""
        extras = {
            key: value(config) if callable(value) else value
            for key, value in self.config_extras.items()
            if getattr(config, key, None) is None
        }
        return {**extras, **self.hf_overrides}


def _rotary_dim(config: Any) -> int:
    """Dimensions of a head that are rotated."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
    return int(head_dim * share)


_EXPERTS = ("repacked_experts", "experts_without_slots")
_MOE = VllmRow(workarounds=_EXPERTS)
_DENSE = VllmRow(slots=("attention", "mlp"))
_BESIDE_EXPERTS: tuple[TargetGroup, ...] = ("attention", "router", "shared_experts", "mlp")
_NO_MLA = {"VLLM_MLA_DISABLE": "1"}
_MLA_NOTE = (
    "on the CPU its latent attention runs as plain attention: vLLM's kernel for AMX takes bfloat16 only and "
    "frees weights that an update needs"
)
_TRANSFORMERS = VllmRow(
    workarounds=_EXPERTS,
    transformers_backend=True,
    note="vLLM has no class of its own for it and runs transformers' modules in its place",
)

VLLM_ROWS: dict[str, VllmRow] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "qwen3_moe": replace(_MOE, slots=("attention", "experts", "router")),
    "qwen2_moe": replace(_MOE, slots=("attention", "experts", "router", "shared_experts", "mlp")),
    "mixtral": replace(_MOE, slots=("attention", "experts", "router")),
    "olmoe": replace(_MOE, slots=("attention", "router")),
    "granitemoe": replace(_MOE, slots=("attention",)),
    "glm4_moe": replace(_MOE, slots=_BESIDE_EXPERTS),
    "dots1": replace(_TRANSFORMERS, slots=("attention", "mlp")),
    "flex_olmo": replace(_TRANSFORMERS, slots=("attention", "router")),
    "hunyuan_v1_moe": replace(_TRANSFORMERS, slots=("attention", "router")),
    "gpt_oss": VllmRow(workarounds=(*_EXPERTS, "gpt_oss_loaders")),
    "deepseek_v2": VllmRow(
        environment=_NO_MLA,
        workarounds=(*_EXPERTS, "rotary_queries_by_head"),
        note=_MLA_NOTE,
        slots=_BESIDE_EXPERTS,
    ),
    "deepseek_v3": VllmRow(
        # transformers 5 dropped both keys from its config class; without them vLLM builds no correction bias
        # and takes a softmax.
        config_extras={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        environment=_NO_MLA,
        workarounds=(*_EXPERTS, "rotary_queries_by_head"),
        note=_MLA_NOTE,
        slots=_BESIDE_EXPERTS,
    ),
    "phimoe": VllmRow(
        # transformers writes PhimoeForCausalLM, which vLLM does not know by that spelling.
        hf_overrides={"architectures": ["PhiMoEForCausalLM"]},
        workarounds=(*_EXPERTS, "phimoe_head_bias"),
        note="vLLM routes with a jitter of 0.01 whatever router_jitter_noise says: keep it at 0.01",
    ),
    "ernie4_5_moe": VllmRow(workarounds=(*_EXPERTS, "router_bias"), slots=_BESIDE_EXPERTS),
    "minimax_m2": VllmRow(
        config_extras={"rotary_dim": _rotary_dim, "scoring_func": "sigmoid", "use_routing_bias": True},
        workarounds=(*_EXPERTS, "router_bias", "named_loaders"),
        slots=("attention", "router"),
    ),
    "dbrx": VllmRow(workarounds=(*_EXPERTS, "dbrx_expert_names"), supports_lora=False),
    "qwen3_next": VllmRow(
        # Prefix caching of a recurrent state needs prompts in chunks, and these lose their seeds on the CPU.
        engine_args={"enable_prefix_caching": False},
        workarounds=_EXPERTS,
        dtypes=("bfloat16",),
        note="vLLM's linear attention on the CPU takes bfloat16 only; heads of 64 and 128 work, 32 does not",
    ),
}
"""By `model_type`."""

UNTESTED = VllmRow(workarounds=_EXPERTS, note="untested: a parity probe at the start decides")
"""For an architecture without a row of its own."""


def vllm_row(model_type: str) -> VllmRow:
    """The row of an architecture; `UNTESTED` where there is none."""
    return VLLM_ROWS.get(model_type, UNTESTED)

"""The table of architectures: a row for each that works, and the reason for each that is refused.

Measurements of each, in trainer and engine, are in docs/architectures.md.
"""

from __future__ import annotations

from actors.models.architectures.row import Architecture, Router
from actors.models.spec import TargetGroup

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LATENT_ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
"""DeepSeek's multi-head latent attention; `q_proj` in models without a query rank, else `q_a` and `q_b`."""
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_ONE_SHARED = {"n_shared_experts": 1}
_LATENT_TWIN = {
    **_ONE_SHARED,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
_LINEAR_TWIN = {
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""The smallest linear heads that vLLM runs on the CPU are of 64."""


def _dense(model_type: str) -> Architecture:
    return Architecture(model_type, {"attention": _ATTENTION, "mlp": _MLP})


def _weights(prefix: str) -> tuple[str, ...]:
    """Linear layers of an MoE architecture, named as parameters.

    As modules PEFT would take `...gate_proj` for the experts' old name and silently adapt the fused
    experts instead (peft.utils.transformers_weight_conversion). The files have the same tensor names.
    """
    return tuple(f"{prefix}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj"))


def _parameters(
    router: str = "mlp.gate.weight", shared: str | None = None, *, dense_layers: bool = False
) -> dict[TargetGroup, tuple[str, ...]]:
    """Experts and router under their usual names, with shared experts and layers without experts."""
    found: dict[TargetGroup, tuple[str, ...]] = {"experts": _EXPERTS, "router": (router,)}
    if shared is not None:
        found["shared_experts"] = _weights(shared)
    if dense_layers:
        found["mlp"] = _weights("mlp")
    return found


ROWS = (
    _dense("llama"),
    _dense("mistral"),
    _dense("qwen2"),
    _dense("qwen3"),
    Architecture(
        "qwen3_moe",
        {"attention": _ATTENTION},
        _parameters(dense_layers=True),
        Router("mlp.gate", gates="softmax"),
    ),
    Architecture(
        "qwen2_moe",
        {"attention": _ATTENTION},
        _parameters(shared="mlp.shared_expert", dense_layers=True),
        Router("mlp.gate", gates="softmax"),
    ),
    Architecture(
        "mixtral",
        {"attention": _ATTENTION},
        _parameters(),
        Router("mlp.gate", gates="normalised_softmax"),
        experts_key="num_local_experts",
    ),
    Architecture("olmoe", {"attention": _ATTENTION}, _parameters(), Router("mlp.gate", gates="softmax")),
    Architecture("flex_olmo", {"attention": _ATTENTION}, _parameters(), Router("mlp.gate", gates="softmax")),
    Architecture(
        "granitemoe",
        {"attention": _ATTENTION},
        {
            "experts": ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
            "router": ("block_sparse_moe.router.weight",),
        },
        Router("block_sparse_moe.router", logits_at=2, experts_at=0, gates="softmax_of_chosen"),
        experts_key="num_local_experts",
    ),
    Architecture(
        "glm4_moe",
        {"attention": _ATTENTION},
        _parameters(shared="mlp.shared_experts", dense_layers=True),
        Router("mlp.gate", score="sigmoid", has_aux_loss=False, gates="scaled_sigmoid"),
        experts_key="n_routed_experts",
    ),
    Architecture(
        "dots1",
        {"attention": _ATTENTION},
        _parameters(shared="mlp.shared_experts", dense_layers=True),
        Router("mlp.gate", score="sigmoid", has_aux_loss=False, gates="scaled_sigmoid"),
        experts_key="n_routed_experts",
        twin=_ONE_SHARED,
    ),
    Architecture(
        "deepseek_v2",
        {"attention": _LATENT_ATTENTION},
        _parameters(shared="mlp.shared_experts", dense_layers=True),
        Router("mlp.gate", has_aux_loss=False, gates="scaled_softmax"),
        experts_key="n_routed_experts",
        twin=_LATENT_TWIN,
    ),
    Architecture(
        "deepseek_v3",
        {"attention": _LATENT_ATTENTION},
        _parameters(shared="mlp.shared_experts", dense_layers=True),
        Router("mlp.gate", score="sigmoid", has_aux_loss=False, gates="scaled_sigmoid"),
        experts_key="n_routed_experts",
        twin=_LATENT_TWIN,
    ),
    Architecture(
        "ernie4_5_moe",
        {"attention": _ATTENTION},
        _parameters(shared="mlp.shared_experts", dense_layers=True),
        Router("mlp.gate", gates="floored_softmax"),
        experts_key="moe_num_experts",
        top_k_key="moe_k",
        untrained=("e_score_correction_bias",),
        twin={"moe_layer_interval": 1, "moe_num_shared_experts": 1},
    ),
    Architecture(
        "minimax_m2",
        {"attention": _ATTENTION},
        _parameters(),
        Router("mlp.gate", score="sigmoid", gates="normalised_sigmoid"),
        experts_key="num_local_experts",
        twin={"rotary_dim": 16},
    ),
    Architecture(
        "hunyuan_v1_moe",
        {"attention": _ATTENTION},
        _parameters("mlp.gate.wg.weight", shared="mlp.shared_mlp"),
        Router("mlp.gate", has_aux_loss=False, gates="normalised_softmax"),
        top_k_key="moe_topk",
    ),
    Architecture(
        "phimoe",
        {"attention": _ATTENTION},
        {"experts": _EXPERTS},
        Router(
            "mlp.router",
            samples_in_training=True,
            why_no_replay=(
                "an expert's gate depends on which of the two was picked first, and is 0 for one that the "
                "trainer would not have picked"
            ),
        ),
        experts_key="num_local_experts",
        refused={
            "router": (
                "without sampling, its gates are 1 except where two experts nearly tie, so that the loss has "
                "no gradient by the router"
            )
        },
        limits=(
            "Its routers choose the best experts while training too; transformers would sample at random.",
        ),
    ),
    Architecture(
        "gpt_oss",
        {"attention": _ATTENTION},
        _parameters("mlp.router.weight"),
        Router("mlp.router", gates="softmax_of_chosen"),
        experts_key="num_local_experts",
        packs="padding_free",
        attention="eager",
        limits=(
            "Attention has sinks, which transformers computes eagerly: `attn_implementation: sdpa` is ours, "
            "which takes packed rows.",
            "Experts in MXFP4, as it is published, are dequantised into 16 bits while they are read.",
        ),
    ),
    Architecture(
        "dbrx",
        {"attention": ("Wqkv", "out_proj")},
        router=Router(
            "ffn.router",
            logits_at=None,
            experts_at=None,
            why_no_replay="its router module hands out logits only, and the choice is made outside of it",
        ),
        experts_key="ffn_config.moe_num_experts",
        top_k_key="ffn_config.moe_top_k",
        aux_loss_key="ffn_config.moe_loss_weight",
        grouped_experts=False,
        shards_by_layer=False,
        refused={
            "experts": "its experts read each other's weights by name, which PEFT's wrappers do not pass on",
            "router": "only LoRA on its attention has been proved in both halves of the loop",
        },
    ),
    Architecture(
        "qwen3_next",
        {"attention": (*_ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj")},
        _parameters(shared="mlp.shared_expert", dense_layers=True),
        Router("mlp.gate", why_no_replay="it trains by sft only"),
        packs="no",
        stages=("sft",),
        twin=_LINEAR_TWIN,
        why_only=(
            "vLLM computes it in bfloat16 only on the CPU, where rounding moves its log-probabilities by .01 "
            "to .05 on average (random models), in transformers as in vLLM: two to five times as far as "
            "qwen3_moe's"
        ),
        limits=("Its linear attention carries state along a row, so rows are padded, not packed.",),
    ),
)
"""The whole table; `actors.models.architectures.lookup` finds a row by `model_type`."""

REFUSED: dict[str, str] = {
    "jamba": (
        "vLLM has no CPU kernel for its mamba layers (selective scan), so nothing can be generated with it; "
        "granitemoe, olmoe and qwen3_moe are mixtures of experts of similar sizes that work"
    ),
    "minimax": (
        "vLLM has removed its class, and vLLM's transformers backend refuses linear attention; "
        "minimax_m2, its successor without linear attention, works"
    ),
    "switch_transformers": (
        "it is an encoder-decoder, and vLLM has no class for it; mixtral and olmoe are decoders that work"
    ),
    "lfm2_moe": (
        "vLLM's log-probabilities differ from transformers' by up to 2.4 from its first layer of attention "
        "after a convolution on, for a reason not yet known; olmoe and qwen3_moe work"
    ),
}
"""Architectures that were tried and do not work in one half of the loop, with the reason and what would."""

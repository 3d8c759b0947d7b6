"""A tiny random model of every architecture in the table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.spec import TargetGroup

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.05,
}
_DENSE = {"intermediate_size": 128, "head_dim": 32}
_QWEN_MOE = {
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
_LOCAL = {"intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2}
_ROUTED = {
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
_LATENT = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}

SIZES: dict[str, dict[str, Any]] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": {"intermediate_size": 128},
    "qwen3": _DENSE,
    "qwen3_moe": {**_QWEN_MOE, "head_dim": 32},
    "qwen2_moe": {**_QWEN_MOE, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "mixtral": {**_LOCAL, "head_dim": 32},
    "olmoe": {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "flex_olmo": {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {**_LOCAL, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "glm4_moe": {**_ROUTED, "head_dim": 32, "n_group": 1, "topk_group": 1, "use_qk_norm": True},
    "dots1": {**_ROUTED, "head_dim": 32, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
    "deepseek_v2": {**_LATENT, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "ernie4_5_moe": {
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 1,
    },
    "minimax_m2": {
        **_LOCAL,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "hunyuan_v1_moe": {"intermediate_size": 64, "head_dim": 32, "num_experts": 8, "moe_topk": 2},
    "phimoe": {**_LOCAL, "router_jitter_noise": 0.01, "attention_bias": True, "lm_head_bias": True},
    "gpt_oss": {
        **_LOCAL,
        "head_dim": 32,
        "sliding_window": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
            "rope_theta": 150000.0,
        },
    },
    "dbrx": {
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 128,
            "ffn_hidden_size": 64,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "qwen3_next": {
        **_QWEN_MOE,
        "num_hidden_layers": 4,
        "head_dim": 64,
        "shared_expert_intermediate_size": 64,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_conv_kernel_dim": 4,
        "mlp_only_layers": [0],
    },
}
_MOE: list[TargetGroup] = ["attention", "experts", "router"]
_SHARED_AND_DENSE: list[TargetGroup] = [*_MOE, "shared_experts", "mlp"]
GROUPS: dict[str, list[TargetGroup]] = {
    "llama": ["attention", "mlp"],
    "mistral": ["attention", "mlp"],
    "qwen2": ["attention", "mlp"],
    "qwen3": ["attention", "mlp"],
    "qwen3_moe": _MOE,
    "qwen2_moe": _SHARED_AND_DENSE,
    "mixtral": _MOE,
    "olmoe": _MOE,
    "flex_olmo": _MOE,
    "granitemoe": _MOE,
    "glm4_moe": _SHARED_AND_DENSE,
    "dots1": _SHARED_AND_DENSE,
    "deepseek_v2": _SHARED_AND_DENSE,
    "deepseek_v3": _SHARED_AND_DENSE,
    "ernie4_5_moe": _SHARED_AND_DENSE,
    "minimax_m2": _MOE,
    "hunyuan_v1_moe": [*_MOE, "shared_experts"],
    "phimoe": ["attention", "experts"],
    "gpt_oss": _MOE,
    "dbrx": ["attention"],
    "qwen3_next": _SHARED_AND_DENSE,
}
"""All groups that can be adapted in each of these models."""

OF_EACH_KIND = (
    "llama",  # dense
    "qwen3_moe",  # the usual mixture of experts
    "qwen2_moe",  # a shared expert and a layer without experts
    "mixtral",  # experts with other names in a checkpoint
    "granitemoe",  # a router that returns something else
    "deepseek_v3",  # latent attention, sigmoid scores with a correction
    "gpt_oss",  # transposed experts with biases, attention sinks
    "phimoe",  # a router that samples
    "dbrx",  # experts of its own
)
"""Architectures that the fast tests train; the others are among the slow ones."""


def architectures(
    names: Iterable[str] = tuple(ARCHITECTURES), fast: Iterable[str] = OF_EACH_KIND
) -> list[Any]:
    """Parameters of a test that runs for every architecture of the table, or some; slow but for `fast`."""
    import pytest  # here, as the models are also those of a check without pytest

    slow = [pytest.mark.architectures, pytest.mark.slow]
    marks = {name: slow[:1] if name in fast else slow for name in names}
    return [pytest.param(name, marks=marks[name], id=name) for name in sorted(names)]


def tiny_config_of(model_type: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    common = {
        k: v for k, v in _COMMON.items() if model_type != "dbrx" or not k.startswith(("num_", "hidden"))
    }
    return AutoConfig.for_model(model_type, **{**common, **SIZES[model_type], **overrides})


def write_mxfp4(directory: Path, seed: int = 0) -> None:
    """A tiny random gpt-oss as it is published, experts in MXFP4, the rest in bfloat16; no tokenizer."""
    from safetensors.torch import save_file

    model = tiny_model("gpt_oss", seed).bfloat16()
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        shape = (experts, rows, columns // 32, 16)
        state[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        # Powers of two, 127 being 1: weights of about .05.
        state[f"{name}_scales"] = torch.randint(121, 124, shape[:3], generator=generator).to(torch.uint8)
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    config["architectures"] = ["GptOssForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config))
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model, and nothing of it 0 or 1 as in a fresh one: norms, biases, sinks, ERNIE's routers."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config_of(model_type, **overrides))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.ndim == 1 or "bias" in name:
                    tensor += 0.1 * torch.randn(tensor.shape)
                elif not tensor.any():
                    tensor += 0.05 * torch.randn(tensor.shape)
    return model

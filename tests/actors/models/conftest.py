"""Tiny random bases of every architecture in the table, and adapters that do something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.models.adapters import adapter_parameters, attach_lora
from actors.models.loading import load_base
from actors.models.spec import LoraSpec, ModelSpec, TargetGroup

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

SIZES: dict[str, dict[str, Any]] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": {"intermediate_size": 128},
    "qwen3": _DENSE,
    "qwen3_moe": {**_QWEN_MOE, "head_dim": 32},
    "qwen2_moe": {**_QWEN_MOE, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "mixtral": {**_LOCAL, "head_dim": 32},
    "olmoe": {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "granitemoe": {**_LOCAL, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "glm4_moe": {
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "head_dim": 32,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
    },
}
GROUPS: dict[str, list[TargetGroup]] = {
    "llama": ["attention", "mlp"],
    "mistral": ["attention", "mlp"],
    "qwen2": ["attention", "mlp"],
    "qwen3": ["attention", "mlp"],
    "qwen3_moe": ["attention", "experts", "router"],
    "qwen2_moe": ["attention", "experts", "router", "shared_experts", "mlp"],
    "mixtral": ["attention", "experts", "router"],
    "olmoe": ["attention", "experts", "router"],
    "granitemoe": ["attention", "experts", "router"],
    "glm4_moe": ["attention", "experts", "router", "shared_experts", "mlp"],
}
"""All groups that each architecture has."""


def tiny_config_of(model_type: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**_COMMON, **SIZES[model_type], **overrides})


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Any]:
    """Config of a tiny model of an architecture."""
    return tiny_config_of


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a tiny random base of an architecture, made once per session."""
    made: dict[str, Path] = {}

    def make(model_type: str, seed: int = 0, **overrides: Any) -> Path:
        key = f"{model_type}-{seed}-{sorted(overrides.items())}"
        if key not in made:
            from transformers import AutoModelForCausalLM

            from actors.models.tiny import byte_tokenizer

            made[key] = tmp_path_factory.mktemp(model_type)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(tiny_config_of(model_type, **overrides))
            model.save_pretrained(made[key])
            byte_tokenizer().save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def groups_of() -> Callable[[str], list[TargetGroup]]:
    """All target groups that an architecture has."""
    return lambda model_type: list(GROUPS[model_type])


def shake(peft: Any, name: str, seed: int = 1, std: float = 0.05) -> None:
    """Give an adapter a B that isn't zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for full, parameter in adapter_parameters(peft, name).items():
            if "lora_B" in full:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@pytest.fixture(scope="session")
def adapted(base_of: Callable[..., Path]) -> Callable[..., Any]:
    """A base with an adapter `policy` whose B isn't zero."""

    def make(model_type: str, lora: LoraSpec, dtype: str = "float32", **overrides: Any) -> Any:
        model = load_base(ModelSpec(base=str(base_of(model_type, **overrides)), dtype=dtype, lora=lora))
        peft = attach_lora(model, lora, "policy", seed=3)
        shake(peft, "policy")
        return peft

    return make


@pytest.fixture(scope="session")
def randomise_b() -> Callable[..., None]:
    return shake


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """(3, 20) token ids."""
    return torch.randint(3, 256, (3, 20), generator=torch.Generator().manual_seed(5))

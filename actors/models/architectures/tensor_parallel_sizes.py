"""Sizes of a base that tensor-parallel ranks have to share evenly, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TENSOR_PARALLEL = frozenset(
    {
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "flex_olmo",
        "glm4_moe", "dots1", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "minimax_m2",
    }
)  # fmt: skip
"""Architectures whose logits and gradients on two ranks were seen equal to one rank's, with every weight
trained and with LoRA on every group (`tests/actors/models/parallel/test_tensor_parallel.py`)."""
_OF_ATTENTION = ("num_attention_heads", "num_key_value_heads")
_OF_MLPS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


def split_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Config key -> number of heads or columns that transformers' plan splits; empty without a plan."""
    plan = " ".join(config.base_model_tp_plan or {})
    keys = (*(_OF_ATTENTION if "self_attn" in plan else ()), *(_OF_MLPS if ".mlp." in plan else ()))
    found = {key: getattr(config, key, None) for key in keys}
    return {key: int(size) for key, size in found.items() if isinstance(size, int) and size}


def why_not_split(model_type: str, sizes: Mapping[str, int], ranks: int) -> list[str]:
    """Reasons why so many ranks can't hold a base with these `split_sizes` together."""
    if not sizes:
        return [f"transformers has no plan that splits the layers of a {model_type} model"]
    if model_type not in TENSOR_PARALLEL:
        return [f"splitting the layers of a {model_type} model was not tried"]
    return [f"{size} ({key}) can't be shared evenly" for key, size in sizes.items() if size % ranks]

"""The driver's view of models: the tables of architectures, and facts of a base, as plain data.

Facts take torch and transformers to find, but not the weights. So a worker that has imported these finds them
for the driver (`Worker.work`), which then needs neither. The tables are plain data; whoever plans or reports
takes them from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.errors import UserError
from actors.models.architectures.lookup import ARCHITECTURES, REFUSED, replay_problem
from actors.models.architectures.row import Architecture
from actors.models.architectures.table import ROWS
from actors.models.architectures.tensor_parallel_sizes import split_sizes, why_not_split
from actors.models.architectures.vllm_table import VLLM_ROWS, VllmRow, vllm_row
from actors.models.lora.heads import HEAD_FILE, has_sequence_classifier, saved_head
from actors.models.sizes import BaseSizes, Layer, Part, Weight, base_sizes
from actors.models.spec import ModelSpec
from actors.models.speed import measure_cpu

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "ARCHITECTURES",
    "HEAD_FILE",
    "REFUSED",
    "ROWS",
    "VLLM_ROWS",
    "Architecture",
    "BaseFacts",
    "BaseSizes",
    "Layer",
    "Part",
    "VllmRow",
    "Weight",
    "bare_model",
    "base_facts",
    "base_sizes",
    "describe_small",
    "has_sequence_classifier",
    "max_positions",
    "measure_cpu",
    "n_experts",
    "n_heads",
    "replay_problem",
    "saved_head",
    "split_sizes",
    "vllm_row",
    "why_not_split",
]


@dataclass(frozen=True)
class BaseFacts:
    """Sizes of a base, what LoRA would train of it, and the reasons why it can't be used."""

    max_positions: int | None
    """Longest sequence that the base was made for, in tokens; None where its config doesn't say."""
    lora_targets: str | None
    """Table of the weights that get an adapter; None where everything trains."""
    problems: list[str] = field(default_factory=list)
    """Everything that is wrong with the base, its adapter and the LoRA targets."""
    model_type: str | None = None
    """Its architecture, where the config could be read."""
    n_experts: int | None = None
    """Experts of each layer; None for a dense model, and for an architecture that is not in the table."""
    split_sizes: dict[str, int] | None = None
    """Sizes that tensor-parallel ranks share evenly (`tensor_parallel_sizes.py`); None: not known."""
    sizes: BaseSizes | None = None
    """Its weights, for plans of memory; None where the base can't be used."""
    n_heads: int | None = None
    """Attention heads of a layer, which sequence-parallel ranks share evenly; None: not known."""


def max_positions(config: PretrainedConfig) -> int | None:
    """Positions that a base was made for; None where its config doesn't say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def n_experts(config: PretrainedConfig) -> int | None:
    """Experts of each layer; None for a dense model, and for an architecture that is not in the table.

    Raises:
        UserError: layers differ in it.
    """
    row = ARCHITECTURES.get(config.model_type)
    return row.n_experts(config) or None if row is not None else None


def describe_small(config: PretrainedConfig, spec: ModelSpec) -> list[str]:
    """Lines for users: memory of a base with `model.quantization`, and that experts in MXFP4 are dequantised.

    Raises:
        UserError: it can't be quantised.
    """
    import torch

    from actors.models.base.mxfp4 import is_mxfp4
    from actors.models.quantization.layout import quantised_sizes

    lines = []
    if is_mxfp4(config):
        lines.append("experts in MXFP4: dequantised into 16 bits while they are read, four times their size")
    if spec.quantization is not None:
        sizes = quantised_sizes(config, spec.quantization, getattr(torch, spec.dtype))
        lines.append(
            f"model.quantization {spec.quantization}: {sizes} ({spec.dtype}); engines hold the whole base in "
            f"{spec.dtype}"
        )
    return lines


def bare_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without storage, for `base_sizes` and LoRA targets.

    Raises:
        UserError: transformers makes no model of it.
    """
    from actors.models.architectures.meta_model import meta_model

    return meta_model(config)


def n_heads(config: PretrainedConfig) -> int | None:
    """Attention heads of each layer; None where the config doesn't say."""
    return getattr(config.get_text_config(), "num_attention_heads", None)


def base_facts(spec: ModelSpec) -> BaseFacts:
    """Look at `spec.base` and resolve `spec.lora`. Never raises for what a user can get wrong."""
    from actors.models.base.loading import local_base_dir, resolve_base
    from actors.models.lora.adapters import check_adapter_matches_base, quantization_problems
    from actors.models.lora.targets import resolve_targets

    base = resolve_base(spec)
    if base.problems or base.config is None:
        return BaseFacts(None, None, base.problems)
    config, targets, experts, found = base.config, None, None, None
    problems: list[str] = []
    try:
        experts = n_experts(config)
        if base.adapter_path is not None:
            local = str(local_base_dir(base.base_path))
            wrong = check_adapter_matches_base(base.adapter_path, config, local)
            wrong = wrong or quantization_problems(base.adapter_path, spec.quantization)
            problems += [f"model.base: {problem}" for problem in wrong]
        if not problems:
            net = bare_model(config)
            found = base_sizes(config, net, spec.quantization)
            if spec.lora is not None:
                targets = str(resolve_targets(net, spec.lora.targets, spec.lora))
    except UserError as error:
        problems += error.problems
    kind, shared, heads = config.model_type, split_sizes(config), n_heads(config)
    return BaseFacts(max_positions(config), targets, problems, kind, experts, shared, found, heads)

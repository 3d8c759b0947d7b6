"""Attention one sequence at a time, for padding-free batches in one row: no mask, no padding.

A dense mask over a packed row costs time and memory for every pair of positions in it. Here each sequence's
queries, keys and values attend causally among themselves. Sequences may share positions (a common prompt):
those are computed once and read by each of them. On CUDA all sequences go through one call of torch's varlen
attention where it can compute the model's (`varlen`), elsewhere in groups (`grouped`).
Measured on a CPU, float32: 1.2 times the speed of packed bins for 16 rows of 256 tokens, 1.7 for pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.batches.attention_plan import AttentionPlan
from actors.models.attention.grouped import GroupedSequences, as_wide_as
from actors.models.attention.shared_out import SharedOutSequences
from actors.models.attention.sinks import attend_with_sinks
from actors.models.attention.varlen import VarlenSequences, runs_varlen

BY_SEQUENCE = "by_sequence"
"""Its name with transformers. With `sdpa` in it, transformers would refuse it for gpt_oss."""
DEVICES = ("cpu", "cuda")

Sequences = GroupedSequences | VarlenSequences
"""The sequences of a padding-free row, in the form in which they attend."""


def use_by_sequence(model: PreTrainedModel) -> type[Sequences] | None:
    """Let `model` accept `sequences=...` in its forward; without it nothing changes.

    Only where transformers' `sdpa` ran before, or eager attention with sinks.

    Returns:
        The form of `sequences`, by the model's device and dtype; None: it doesn't accept them.
    """
    replaced = "eager" if has_sinks(model) else "sdpa"
    if model.config._attn_implementation not in (replaced, BY_SEQUENCE) or model.device.type not in DEVICES:
        return None
    model.set_attn_implementation(BY_SEQUENCE)
    return VarlenSequences if runs_varlen(model) else GroupedSequences


def has_sinks(model: PreTrainedModel) -> bool:
    """True where its attention has sinks, as gpt_oss's; transformers computes those eagerly."""
    return any(name.endswith(".sinks") for name, _ in model.named_parameters())


def arguments(
    form: type[Sequences], plan: AttentionPlan, device: torch.device, ranks: dist.ProcessGroup | None = None
) -> dict[str, object]:
    """Arguments of such a model's forward for the sequences of a row. `ranks`: those that have its
    positions."""
    sequences = form.of(plan, device)
    # A mask of four dimensions: transformers takes it for a finished one and builds none.
    no_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    return {
        "sequences": sequences if ranks is None else SharedOutSequences(sequences, ranks),
        "attention_mask": no_mask,
    }


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sequences: Sequences | SharedOutSequences | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, T, D), key and value (1, kv heads, T, D) -> (1, T, heads, D).

    `s_aux`: transformers' name for attention sinks, (heads,).
    """
    if sequences is not None:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return sequences.attend(q, k, v, dropout, scaling, sliding_window, s_aux)[None], None
    if s_aux is not None:
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
        output = attend_with_sinks(query, key, value, s_aux, attention_mask, dropout, scaling)
        return output.transpose(1, 2), None
    kwargs["sliding_window"] = sliding_window
    size, value = value.shape[-1], as_wide_as(query, value)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output[..., :size], None


ALL_ATTENTION_FUNCTIONS.register(BY_SEQUENCE, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(BY_SEQUENCE, sdpa_mask)

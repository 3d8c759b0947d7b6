"""Attention of sequences in padded groups, a call of torch's attention for each: on any device, in any dtype.

Memory is linear in tokens: torch's own kernels keep no scores where there is no mask, and a sliding window is
attended to in blocks, whose masks have one size whatever the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from actors.batches.attention_plan import AttentionPlan
from actors.models.attention.gather import Gather, picked
from actors.models.attention.sinks import attend_with_sinks

WINDOW_BLOCK = 512
"""Queries of a block under a sliding window, or as many as the window has where that is more. Smaller ones
leave fewer keys unused, and take more calls."""


class GroupedSequences(NamedTuple):
    """`actors.batches.attention_plan.Groups` as tensors."""

    shapes: tuple[tuple[int, int], ...]
    places: Gather | None
    outputs: Gather | None

    @staticmethod
    def of(plan: AttentionPlan, device: torch.device) -> GroupedSequences:
        groups = plan.groups
        places, outputs = (
            None if x is None else Gather.of(x, device) for x in (groups.places, groups.outputs)
        )
        return GroupedSequences(groups.shapes, places, outputs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """query (T, heads, D), key and value (T, kv heads, D) -> (T, heads, D)."""
        sizes = [n * length for n, length in self.shapes]
        # Picked at once: the backward pass then adds up once.
        split = [picked(x, self.places).split(sizes) for x in (query, key, value)]
        outputs = []
        for shape, *parts in zip(self.shapes, *split, strict=True):
            q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
            output = attend_causally(q, k, v, dropout, scaling, window, sinks)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return picked(torch.cat(outputs), self.outputs)


def attend_causally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """query (N, heads, L, D), key and value (N, kv heads, L, D) -> (N, heads, L, D of value).

    Args:
        window: positions that a query attends to at most, its own included; None: all before.
        sinks: (heads,), logits after scaling.
    """
    repeats = query.shape[1] // key.shape[1]
    size, value = value.shape[-1], as_wide_as(query, value)
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    if window is None or query.shape[2] <= window:
        output = _attended(query, key, value, None, dropout, scaling, sinks)
    else:
        output = _attended_in_blocks(query, key, value, window, dropout, scaling, sinks)
    return output[..., :size]


def as_wide_as(query: Tensor, value: Tensor) -> Tensor:
    """`value` with zeros up to the query's size: with narrower ones, as of latent attention, torch makes all
    scores at once."""
    missing = query.shape[-1] - value.shape[-1]
    return pad(value, (0, missing)) if missing > 0 else value


def _attended_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    dropout: float,
    scaling: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Each block of queries attends to its own block of keys and to the one before."""
    size = max(window, WINDOW_BLOCK)
    mask = _window(min(size, query.shape[2]), size, window, query.device)
    blocks = [x.split(size, dim=2) for x in (query, key, value)]
    outputs = []
    for at, (q, k, v) in enumerate(zip(*blocks, strict=True)):
        n = q.shape[2]
        if at == 0:
            seen = None if n <= window else mask[:n, size : size + n]
        else:
            k, v = (torch.cat([x[at - 1], x[at]], dim=2) for x in blocks[1:])
            seen = mask[:n, : size + n]
        outputs.append(_attended(q, k, v, seen, dropout, scaling, sinks))
    return torch.cat(outputs, dim=2)


def _window(queries: int, before: int, width: int, device: torch.device) -> Tensor:
    """bool (queries, before + queries), for keys that begin `before` positions ahead of the queries: causal,
    and at most `width` positions back, the own one included."""
    place = torch.arange(queries, device=device) + before
    distance = place[:, None] - torch.arange(before + queries, device=device)
    return (distance >= 0) & (distance < width)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal without a mask; the rest as `attend_with_sinks`."""
    if sinks is not None:
        return attend_with_sinks(query, key, value, sinks, mask, dropout, scaling)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )

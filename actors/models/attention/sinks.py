"""Attention with sinks by torch's own kernels, which know nothing of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def attend_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Causal attention of query (N, heads, L, D) to key and value (N, heads, S, D) and a sink per head.

    Equal to transformers' eager_attention_forward of gpt_oss, which makes all logits at once.

    Args:
        sinks: (heads,), logits after scaling.
        mask: bool, broadcasts to (N, heads, L, S), True where a query attends; None: each query to the keys
            up to its own place, or a single query to all of them.

    Returns:
        (N, heads, L, D).
    """
    n, heads, length, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    # The sink's key is zero but in a dimension of its own, where every query is 1 and every other key is 0.
    query, key, value = pad(query, (0, 1), value=1.0), pad(key, (0, 1)), pad(value, (0, 1))
    front = (
        pad((sinks.float() / scaling).to(key.dtype)[:, None], (size, 0))
        .expand(n, 1, heads, -1)
        .transpose(1, 2)
    )
    key, value = torch.cat([front, key], dim=2), pad(value, (0, 0, 1, 0))
    causal = mask is None and length > 1
    if causal:
        # A query in front as well: then query i + 1 attends to the sink and to keys 0 to i.
        query = pad(query, (0, 0, 1, 0))
    elif mask is not None:
        mask = pad(mask, (1, 0), value=True)
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return output[:, :, int(causal) :, :size]

"""Attention of all sequences of a row in one call of torch's varlen attention (FlashAttention), on CUDA.

No padding and no mask, memory linear in tokens. Queries are the row itself. Where sequences share a prompt
their keys are picked from the row, so that a sequence has more keys than queries; causal attention then
aligns both at their ends.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import varlen
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel

from actors.batches.attention_plan import AttentionPlan
from actors.models.attention.gather import Gather, picked

DTYPES = (torch.bfloat16, torch.float16)
HEAD_MULTIPLE = 8
"""Sizes of heads that the kernel takes; others are padded."""
FULL_HEADS = ((8, 0), (9, 0), (10, 0))
"""Compute capabilities whose backward kernel takes heads of 256; that of other cards takes 192 at most."""


def runs_varlen(model: PreTrainedModel) -> bool:
    """True where the kernel can compute the attention of all layers: on a card of compute capability 8.0 or
    later, in 16 bits, without dropout, of heads that aren't too large."""
    config = model.config.get_text_config()
    if model.device.type != "cuda" or model.dtype not in DTYPES or getattr(config, "attention_dropout", 0.0):
        return False
    return head_size(config) <= largest_head(model.device)


def head_size(config: PretrainedConfig) -> int:
    """Size of a query's head; with latent attention of both its parts."""
    if getattr(config, "qk_nope_head_dim", None):
        return int(config.qk_nope_head_dim + config.qk_rope_head_dim)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@cache
def largest_head(device: torch.device) -> int:
    """Largest head of the kernel's backward pass on a CUDA device; 0: the kernel doesn't run there."""
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return 0
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return 0
    return 256 if capability in FULL_HEADS else 192


class VarlenSequences(NamedTuple):
    """`actors.batches.attention_plan.Spans` as tensors, with the longest spans."""

    queries: Tensor
    """int32 (S + 1,)."""
    keys: Tensor
    """int32 (S + 1,)."""
    max_queries: int
    max_keys: int
    places: Gather | None

    @staticmethod
    def of(plan: AttentionPlan, device: torch.device) -> VarlenSequences:
        spans = plan.spans
        queries, keys = (torch.from_numpy(x).to(device) for x in (spans.queries, spans.keys))
        places = None if spans.places is None else Gather.of(spans.places, device)
        return VarlenSequences(
            queries, keys, int((plan.lengths - plan.shared).max()), int(plan.lengths.max()), places
        )

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
        """query (T, heads, D), key and value (T, kv heads, D) -> (T, heads, D of value)."""
        assert not dropout, "a model with dropout in its attention runs by groups"
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        size, wide = value.shape[-1], -(-query.shape[-1] // HEAD_MULTIPLE) * HEAD_MULTIPLE
        q = _padded(query, wide)
        k, v = (_padded(picked(x, self.places), wide) for x in (key, value))
        # The kernel counts the keys before the query's own.
        back = -1 if window is None or window >= self.max_keys else window - 1
        if sinks is None:
            spans = self.queries, self.keys, self.max_queries, self.max_keys
            output = varlen.varlen_attn(
                q, k, v, *spans, scale=scale, window_size=(back, 0), enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            output = _WithSinks.apply(q, k, v, sinks, self, scale, back)
        return output[..., :size]


def _padded(x: Tensor, size: int) -> Tensor:
    """(T, heads, D) -> (T, heads, size), with zeros, which change no product."""
    return (pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x).contiguous()


class _WithSinks(torch.autograd.Function):
    """Attention with a sink per head, a logit without a value: the kernel's outputs, each scaled by the share
    of its sum of exponentials that isn't the sink's.

    The kernel's backward pass makes probabilities from the sums it is given. Given those with the sink, and
    the scaled outputs, it makes the gradients of this attention.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        spans: VarlenSequences,
        scale: float,
        back: int,
    ) -> Tensor:
        output, sums = varlen.varlen_attn(
            query,
            key,
            value,
            *(spans.queries, spans.keys, spans.max_queries, spans.max_keys),
            return_aux=varlen.AuxRequest(lse=True),
            scale=scale,
            window_size=(back, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        # (heads, T): logarithms of sums.
        whole = torch.logaddexp(sums, sinks.float()[:, None])
        output = (output * (sums - whole).exp().t()[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, output, whole)
        ctx.spans, ctx.scale, ctx.back = spans, scale, back
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, whole = ctx.saved_tensors
        spans: VarlenSequences = ctx.spans
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        by_input = torch.ops.torch_attn._varlen_attn_backward(
            grad.contiguous(),
            *(query, key, value, output, whole),
            *(spans.queries, spans.keys, spans.max_queries, spans.max_keys),
            ctx.back < 0,
            no_dropout,
            ctx.scale,
            [ctx.back, 0],
        )
        of_sink = (sinks.float()[:, None] - whole).exp()
        by_sink = -(of_sink * (grad.float() * output.float()).sum(-1).t()).sum(1)
        return *by_input, by_sink.to(sinks.dtype), None, None, None

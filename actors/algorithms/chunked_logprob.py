"""Log-probabilities straight from hidden states and a frozen output head, some rows at a time.

The gradient of a label's log-probability by its hidden state, (W_label - sum_v p_v W_v) / temperature, needs
nothing of the loss but one factor per label. It is made in the forward pass while the logits are at hand, so
that (labels, vocabulary) tensors live for one block only and nothing but (labels, hidden) is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actors.algorithms.logprob import LabelStatistics, label_logps, softmax_

HEAD_BLOCK_ELEMENTS = 1 << 23
"""Logits of one block: 32 MiB of float32. Smaller blocks read the head's weights too often."""


def head_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0
) -> LabelStatistics:
    """As `label_statistics` of hidden @ weight^T, with a gradient of `logps` by `hidden` only.

    Shapes: hidden (T, H), weight (V, H), labels int64 (T,).
    """
    return LabelStatistics(*_HeadStatistics.apply(hidden, weight, labels, temperature))


def head_logps(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 (T,): the same log-probabilities, to the bit, without gradient or statistics."""
    with torch.no_grad():
        blocks = _blocks(hidden, weight, labels)
        return torch.cat([label_logps(logits, y, temperature) for logits, y in blocks])


def _blocks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, labels) of some rows at a time. The next logits are written where the last ones stood: memory
    that was just used is in the cache, and mapped."""
    rows = max(1, HEAD_BLOCK_ELEMENTS // len(weight))
    room = hidden.new_empty(min(rows, len(hidden)), len(weight))
    for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        yield torch.mm(h, weight.t(), out=room[: len(h)]), y


class _HeadStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        found, gradients = [], []
        for logits, y in _blocks(hidden, weight, labels):
            found.append(softmax_(logits, y, temperature))
            if ctx.needs_input_grad[0]:
                expected = torch.mm(logits, weight)
                gradients.append(
                    torch.sub(weight.index_select(0, y), expected, out=expected).div_(temperature)
                )
        outputs = tuple(torch.cat(column) for column in zip(*found, strict=True))
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grads[0] is None:
            return None, None, None, None
        (by_hidden,) = ctx.saved_tensors
        return (by_hidden.float() * grads[0][:, None]).to(by_hidden.dtype), None, None, None

"""Log-probabilities straight from hidden states and a frozen output head, some rows at a time.

The gradient of a label's log-probability by its hidden state, (W_label - sum_v p_v W_v) / temperature, needs
nothing of the loss but one factor per label. It is made in the forward pass while the logits are at hand, so
that (labels, vocabulary) tensors live for one block only and nothing but (labels, hidden) is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from actors.algorithms.logprob import LabelStatistics, label_logps, label_statistics

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
        found = [label_logps(linear(h, weight), y, temperature) for h, y in _blocks(hidden, weight, labels)]
    return torch.cat(found)


def _blocks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
    rows = max(1, HEAD_BLOCK_ELEMENTS // len(weight))
    return zip(hidden.split(rows), labels.split(rows), strict=True)


class _HeadStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[0]
        found, gradients = [], []
        for h, y in _blocks(hidden, weight, labels):
            logits = linear(h, weight).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                statistics = label_statistics(logits, y, temperature)
            found.append([x.detach() for x in statistics])
            if wanted:
                ones = torch.ones_like(statistics.logps)
                (gradient,) = torch.autograd.grad(statistics.logps, logits, ones)
                gradients.append(gradient @ weight)
        outputs = tuple(torch.cat(column) for column in zip(*found, strict=True))
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch.cat(gradients) if wanted else None)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grads[0] is None:
            return None, None, None, None
        (by_hidden,) = ctx.saved_tensors
        return (by_hidden.float() * grads[0][:, None]).to(by_hidden.dtype), None, None, None

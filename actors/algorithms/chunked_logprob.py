"""Log-probabilities straight from hidden states and an output head, some rows at a time.

(labels, vocabulary) tensors live for one block only. Under a frozen head the gradient of a label's
log-probability by its hidden state, (W_label - sum_v p_v W_v) / temperature, needs nothing of the loss but
one factor per label: it is made in the forward pass while the logits are at hand, and nothing but
(labels, hidden) is kept. Where the head trains, or the loss holds the entropy, the backward pass makes the
logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actors.algorithms.logprob import LabelStatistics, gradient_, label_logps, softmax_, top_logps

HEAD_BLOCK_ELEMENTS = 1 << 23
"""Logits of one block on the CPU: 32 MiB of float32, near its cache. Smaller blocks read the head's weights
too often."""
DEVICE_SHARE = 128
"""On a device a block of float32 logits takes at most this part of all its memory, rounded down to a power of
two: large products are fast there. Not of what is free, which changes: the same rows in other blocks have
other bits."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def block_elements(device: torch.device) -> int:
    """Logits of one block."""
    return HEAD_BLOCK_ELEMENTS if device.type == "cpu" else _block_of_device(device)


@cache
def _block_of_device(device: torch.device) -> int:
    _, total = torch.cuda.mem_get_info(device)
    return max(HEAD_BLOCK_ELEMENTS, 1 << (total // DEVICE_SHARE // 4).bit_length() - 1)


def has_float32_products(weight: Tensor) -> bool:
    """Products of these 16-bit weights come in float32, as the device adds them up.

    Rounding logits to bfloat16 costs .027 nats a token, and makes the noise of k3 fourfold.
    """
    return weight.dtype in SIXTEEN_BITS and _gives_float32(weight.device, weight.dtype)


@cache
def _gives_float32(device: torch.device, dtype: torch.dtype) -> bool:
    one = torch.ones(8, 8, device=device, dtype=dtype)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # no such kernel, or a torch without the argument
        return False
    return True


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> LabelStatistics:
    """As `label_statistics` of hidden @ weight^T.

    Shapes: hidden (T, H), weight (V, H), labels int64 (T,).
    """
    if weight.requires_grad or entropy_gradient:
        return LabelStatistics(*_MadeAgain.apply(hidden, weight, labels, temperature, entropy_gradient))
    return LabelStatistics(*_MadeOnce.apply(hidden, weight, labels, temperature))


def head_logps(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 (T,): the same log-probabilities, to the bit, without gradient or statistics."""
    with torch.no_grad():
        blocks = _blocks(hidden, weight, labels)
        return torch.cat([label_logps(logits, y, temperature) for _, logits, y in blocks])


def head_further_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, logps: Tensor, ids: Tensor, temperature: float
) -> Tensor:
    """As `further_logps` of hidden @ weight^T. Keeps the tokens' weights, (T, k, H), for the backward pass,
    when slices of a sharded head need not be at hand."""
    apart = weight[ids].float() - weight[labels].float()[:, None]
    return logps[:, None] + torch.einsum("th,tkh->tk", hidden.float(), apart) / temperature


def head_top_logps(hidden: Tensor, weight: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """As `top_logps` of hidden @ weight^T."""
    with torch.no_grad():
        blocks = _blocks(hidden, weight, labels)
        return torch.cat([top_logps(logits, k, temperature) for _, logits, _ in blocks])


def _blocks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, logits, labels) of some rows at a time. The next logits are written where the last ones stood:
    memory that was just used is in the cache, and mapped."""
    several = max(1, block_elements(hidden.device) // len(weight))
    exact = has_float32_products(weight)
    room = None if exact else hidden.new_empty(min(several, len(hidden)), len(weight))
    for first in range(0, max(1, len(hidden)), several):
        rows = slice(first, first + several)
        h = hidden[rows]
        if room is None:
            logits = torch.mm(h, weight.t(), out_dtype=torch.float32)
        else:
            logits = torch.mm(h, weight.t(), out=room[: len(h)])
        yield rows, logits, labels[rows]


class _MadeOnce(torch.autograd.Function):
    """With a gradient of `logps` by `hidden` only."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        found, gradients = [], []
        for _, logits, y in _blocks(hidden, weight, labels):
            found.append(softmax_(logits, y, temperature))
            if ctx.needs_input_grad[0]:
                expected = torch.mm(logits.to(weight.dtype), weight)
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


class _MadeAgain(torch.autograd.Function):
    """With gradients of `logps`, and of `entropy` where that was asked for, by `hidden` and `weight`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, ...]:
        found = [softmax_(logits, y, temperature) for _, logits, y in _blocks(hidden, weight, labels)]
        outputs = tuple(torch.cat(column) for column in zip(*found, strict=True))
        ctx.mark_non_differentiable(*outputs[2 if entropy_gradient else 1 :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, labels)
        ctx.temperature = temperature
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        by_logp, by_entropy = grads[:2]
        if by_logp is None and by_entropy is None:
            return None, None, None, None, None
        hidden, weight, labels = ctx.saved_tensors
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Of 16 bits: summed over blocks in float32.
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows, logits, y in _blocks(hidden, weight, labels):
            p = logits.float()
            entropy = softmax_(p, y, ctx.temperature)[1]
            of_logp, of_entropy = (None if x is None else x[rows] for x in (by_logp, by_entropy))
            by_logits = gradient_(p, y, of_logp, of_entropy, entropy, ctx.temperature).to(weight.dtype)
            if by_hidden is not None:
                torch.mm(by_logits, weight, out=by_hidden[rows])
            if by_weight is not None:
                by_weight.addmm_(by_logits.t().float(), hidden[rows].float())
        return by_hidden, None if by_weight is None else by_weight.to(weight.dtype), None, None, None

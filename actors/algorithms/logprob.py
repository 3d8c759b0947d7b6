"""Log-probabilities and statistics of labels under logits, with one softmax kept for the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 19
"""Logits handled at a time on the CPU: 2 MiB of float32, so a block stays in the second-level cache."""


class LabelStatistics(NamedTuple):
    """Of T labels; every tensor is (T,)."""

    logps: Tensor
    """float32 log-probability, with gradient if the logits have one."""
    entropy: Tensor
    """float32, nats; with gradient where that was asked for."""
    correct: Tensor
    """bool: no other logit is larger than the label's."""
    mean_logits: Tensor
    """float32 mean over the vocabulary."""
    log_sum_sq: Tensor
    """float32 log of the sum of squared probabilities."""


def label_logps(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 (T,) log-probabilities without gradient under softmax(logits / temperature).

    `logits` (T, V), `labels` int64 (T,).
    """
    parts = []
    with torch.no_grad():
        for block, wanted in zip(*_blocks(logits, labels), strict=True):
            # The arithmetic of label_statistics: equal weights then give equal bits, and a reference
            # that equals the policy gives rewards of exactly 0.
            block = _scaled(block, temperature)
            top = block.amax(dim=-1)
            log_z = top + (block - top[:, None]).exp_().sum(-1).log()
            parts.append(block.gather(1, wanted[:, None])[:, 0] - log_z)
    return torch.cat(parts)


def label_statistics(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, entropy_gradient: bool = False
) -> LabelStatistics:
    """Log-probabilities with gradient, and statistics without, under softmax(logits / temperature).

    Args:
        logits: (T, V).
        labels: int64 (T,).
        temperature: what logits are divided by first; `mean_logits` is of the divided ones too.
        entropy_gradient: the entropy gets a gradient as well.
    """
    return LabelStatistics(*_LabelStatistics.apply(logits, labels, temperature, entropy_gradient))


def further_logps(logits: Tensor, labels: Tensor, logps: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """float32 (T, k): log-probabilities of further tokens, with gradient, by the labels' own.

    Args:
        logits: (T, V).
        labels: int64 (T,).
        logps: (T,), of the labels under softmax(logits / temperature).
        ids: int64 (T, k).
        temperature: of these.
    """
    away = logits.gather(1, ids).float() - logits.gather(1, labels[:, None]).float()
    return logps[:, None] + away / temperature


def top_logps(logits: Tensor, k: int, temperature: float) -> Tensor:
    """float64 (T, 2 k): ids of the k most probable tokens, then their log-probabilities under
    softmax(logits / temperature), without gradient; `logits` (T, V)."""
    parts = []
    with torch.no_grad():
        for block, _ in zip(*_blocks(logits, logits[:, 0]), strict=True):
            block = _scaled(block, temperature)
            values, ids = block.topk(k, dim=-1)
            found = values.double() - block.double().logsumexp(-1, keepdim=True)
            parts.append(torch.cat([ids.double(), found], dim=-1))
    return torch.cat(parts)


def softmax_(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The fields of LabelStatistics of (T, V) logits, which turn into their probabilities; no gradient."""
    blocks = zip(*_blocks(logits, labels), strict=True)
    parts = [_statistics(_scaled(block, temperature), wanted, block) for block, wanted in blocks]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _statistics(block: Tensor, wanted: Tensor, probabilities: Tensor | None) -> tuple[Tensor, ...]:
    """The fields of LabelStatistics of (T, V) float32 logits; their softmax goes to `probabilities`, which
    may be the logits' own memory."""
    top = block.amax(dim=-1)  # max with indices takes 24 times as long on the CPU
    chosen = block.gather(1, wanted[:, None])[:, 0]
    mean = block.mean(-1)
    raised = torch.sub(block, top[:, None]).exp_()
    total = raised.sum(-1)
    log_total = total.log()
    log_z = top + log_total
    entropy = log_z - torch.linalg.vecdot(raised, block) / total
    log_sum_sq = torch.linalg.vecdot(raised, raised).log() - 2 * log_total
    if probabilities is not None:
        torch.div(raised, total[:, None], out=probabilities)
    return chosen - log_z, entropy, chosen >= top, mean, log_sum_sq


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def _blocks(logits: Tensor, labels: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = max(1, len(labels)) if logits.is_cuda else max(1, BLOCK_ELEMENTS // logits.shape[-1])
    return logits.split(rows), labels.split(rows)


class _LabelStatistics(torch.autograd.Function):
    """Softmax cross-entropy per token. Keeps the probabilities and turns them into the gradient in place:
    log_softmax would keep one (T, V) tensor and allocate another."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, ...]:
        probabilities = torch.empty_like(logits, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        parts: list[tuple[Tensor, ...]] = []
        first = 0
        for block, wanted in zip(*_blocks(logits, labels), strict=True):
            out = None if probabilities is None else probabilities[first : first + len(block)]
            parts.append(_statistics(_scaled(block, temperature), wanted, out))
            first += len(block)
        outputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*outputs[2 if entropy_gradient else 1 :])
        ctx.set_materialize_grads(False)
        ctx.probabilities, ctx.labels, ctx.dtype = probabilities, labels, logits.dtype
        ctx.temperature, ctx.entropy = temperature, outputs[1].clone() if entropy_gradient else None
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grads[0] is None and grads[1] is None:
            return None, None, None, None
        gradient, ctx.probabilities = ctx.probabilities, None
        assert gradient is not None, "the graph of label_statistics can be walked once only"
        return (
            gradient_(gradient, ctx.labels, grads[0], grads[1], ctx.entropy, ctx.temperature).to(ctx.dtype),
            None,
            None,
            None,
        )


def gradient_(
    probabilities: Tensor,
    labels: Tensor,
    by_logp: Tensor | None,
    by_entropy: Tensor | None,
    entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """Turn float32 (T, V) probabilities into the gradient by the logits.

    dlogp / dz_j = [j is the label] - p_j; dH / dz_j = -p_j (log p_j + H); each divided by the temperature.

    `by_logp`, `by_entropy` (T,): the loss's gradient by the outputs, None for zero; `entropy` (T,): H.
    """
    of_logp = torch.zeros_like(probabilities[:, 0]) if by_logp is None else by_logp / temperature
    if by_entropy is None:
        probabilities.mul_(-of_logp[:, None])
    else:
        assert entropy is not None
        _with_entropy_gradient_(probabilities, of_logp, by_entropy / temperature, entropy)
    return probabilities.scatter_add_(1, labels[:, None], of_logp[:, None])


def _with_entropy_gradient_(p: Tensor, by_logp: Tensor, by_entropy: Tensor, entropy: Tensor) -> None:
    """Replace probabilities (T, V) by their share of the gradient: dH / dz_j = -p_j (log p_j + H)."""
    first = 0
    for block, _ in zip(*_blocks(p, by_logp), strict=True):
        rows = slice(first, first + len(block))
        of_entropy = torch.special.xlogy(block, block).addcmul_(block, entropy[rows, None])
        block.mul_(-by_logp[rows, None]).sub_(of_entropy.mul_(by_entropy[rows, None]))
        first += len(block)

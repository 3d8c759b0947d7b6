"""Distillation from a teacher's most probable next tokens: generalised Jensen-Shannon divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from actors.algorithms import checks as rl_checks
from actors.algorithms.loss import Loss, MetricSums, SamplingTemperature, TokenView, Totals
from actors.algorithms.policy import beyond
from actors.batches.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor

TOP_IDS, TOP_LOGPS = "teacher_top_ids", "teacher_top_logps"
"""Token columns (T, k): the teacher's most probable tokens, int64, and its log-probabilities of them,
float64."""
LEAST_REST = 1e-7
"""Probability of all other tokens together, at least, so that it has a logarithm. TRL's bound."""


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """(T,): JSD(beta) of distributions of n events, as (T, n) log-probabilities; gradient through both.

    beta 0: KL(q, p), of the teacher q from the student p. beta 1: KL(p, q). Between:
    beta KL(q, m) + (1 - beta) KL(p, m), where m = beta q + (1 - beta) p (GKD, arXiv 2306.13649, eq. 1, with
    beta and teacher as in TRL's `generalized_jsd_loss`).
    """
    import torch

    p, q = student.exp(), teacher.exp()
    if beta == 0:
        return (q * (teacher - student)).sum(-1)
    if beta == 1:
        return (p * (student - teacher)).sum(-1)
    m = torch.log(beta * q + (1 - beta) * p)
    return (beta * q * (teacher - m) + (1 - beta) * p * (student - m)).sum(-1)


def with_rest(logps: Tensor) -> Tensor:
    """(T, k) log-probabilities of some tokens -> (T, k + 1), the last of all others together."""
    import torch

    total = logps.logsumexp(-1, keepdim=True).clamp(max=-LEAST_REST)
    return torch.cat([logps, torch.log(-torch.expm1(total))], dim=-1)


class DistillLoss(SamplingTemperature, Loss):
    """Mean over tokens of the divergence between policy and teacher of each next token, over the teacher's
    `k` most probable tokens and all others as one."""

    further_tokens: ClassVar[str | None] = TOP_IDS

    beta: float = Field(default=1.0, ge=0, le=1)
    """0: forward KL, 1: reverse KL, between: Jensen-Shannon."""
    ratio_tolerance: float = rl_checks.RATIO_TOLERANCE["float32"]
    """Of `ratio/beyond`: see `rl_checks.check_first_ratio`."""

    @property
    def required_columns(self) -> tuple[str, ...]:
        return ("old_logps", "mask", TOP_IDS, TOP_LOGPS)

    def totals(self, batch: Batch) -> Totals:
        """`tokens` that count, at least 1."""
        return {"tokens": max(1.0, float(batch.token_columns["mask"].sum()))}

    def __call__(self, view: TokenView, totals: Totals) -> tuple[Tensor, MetricSums]:
        assert view.further_logps is not None
        weights = view.token_columns["mask"].double()
        teacher = view.token_columns[TOP_LOGPS]
        student = with_rest(view.further_logps.double())
        each = generalized_jsd(student, with_rest(teacher), self.beta)
        old, tokens = view.token_columns["old_logps"], weights.sum()
        metrics: MetricSums = {
            "entropy": ((view.entropy.detach() * weights).sum(), tokens),
            "teacher_top_mass": ((teacher.exp().sum(-1) * weights).sum(), tokens),
            **beyond(view, old, weights, self.ratio_tolerance),
        }
        return (each * weights).sum() / totals["tokens"], metrics

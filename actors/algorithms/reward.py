"""Reward modelling: Bradley-Terry on the scores of a (chosen, rejected) pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from actors.algorithms.loss import Loss, MetricSums, TokenView, Totals, largest, smallest
from actors.batches.batch import Batch
from actors.spec import Spec

if TYPE_CHECKING:
    import torch

MARGIN = "margin"
"""Column of a pair's margin: how much better the chosen answer must score (Llama 2, arXiv 2307.09288)."""


class RewardSettings(Spec):
    """Settings of a reward model's loss."""

    center_rewards_coefficient: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Weight of (reward of chosen + reward of rejected)^2, which keeps rewards around 0; null: none
    (arXiv 2312.09244)."""


class RewardLoss(RewardSettings, Loss):
    """-log sigmoid(r_chosen - r_rejected - margin), mean over pairs, as TRL 1.16's RewardTrainer has it."""

    uses_dropout: ClassVar[bool] = False
    reads: ClassVar[Literal["logps", "values", "scores"]] = "scores"

    def totals(self, batch: Batch) -> Totals:
        return {"pairs": float(max(1, batch.n_rows))}

    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        from torch.nn.functional import logsigmoid

        assert view.scores is not None
        scores = view.scores.double()
        chosen, rejected = scores[0::2], scores[1::2]
        difference = chosen - rejected
        losses = -logsigmoid(difference - view.columns.get(MARGIN, 0.0))
        if self.center_rewards_coefficient is not None:
            losses = losses + self.center_rewards_coefficient * (chosen + rejected) ** 2
        pairs = float(view.n_rows)
        metrics: MetricSums = {
            "accuracy": ((difference > 0).sum(), pairs),
            "margin": (difference.detach().sum(), pairs),
            "mean_reward": (scores.detach().sum(), 2 * pairs),
            "min_reward": smallest(scores),
            "max_reward": largest(scores),
        }
        return losses.sum() / totals["pairs"], metrics

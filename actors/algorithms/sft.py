"""Supervised fine-tuning: mean negative log-likelihood of the answer's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.algorithms.loss import Loss, MetricSums, TokenView, Totals
from actors.batches.batch import Batch

if TYPE_CHECKING:
    import torch


class SftLoss(Loss):
    """Token-mean negative log-likelihood over the global batch."""

    def totals(self, batch: Batch) -> Totals:
        return {"tokens": float(max(1, batch.loss_mask.sum()))}

    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        count = float(view.logps.numel())
        metrics: MetricSums = {
            "entropy": (view.entropy.sum(), count),
            "mean_token_accuracy": (view.correct.sum(), count),
        }
        return -view.logps.sum() / totals["tokens"], metrics

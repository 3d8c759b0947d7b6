"""The critic's loss: squared error to returns, with clipping of how far the value moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from actors.algorithms.loss import Loss, MetricSums, TokenView, Totals
from actors.batches.batch import Batch
from actors.spec import Spec

if TYPE_CHECKING:
    import torch


class ValueSettings(Spec):
    """Settings of the critic's loss."""

    vf_coef: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Weight of the value loss."""
    cliprange_value: float | None = Field(default=0.2, gt=0, allow_inf_nan=False)
    """New values are clipped to this distance from the old ones; null: not clipped."""


class ValueLoss(ValueSettings, Loss):
    """vf_coef / 2 * mean over tokens of max((V - R)^2, (clip(V, V_old +- eps) - R)^2), as TRL's PPO had it.

    Token columns read: `returns`, `old_values`; `mask` (bool) if there.
    """

    uses_dropout: ClassVar[bool] = False
    reads: ClassVar[Literal["logps", "values", "scores"]] = "values"
    gradient_may_vanish: ClassVar[bool] = True

    @property
    def required_columns(self) -> tuple[str, ...]:
        return ("returns", "old_values")

    def totals(self, batch: Batch) -> Totals:
        mask = batch.token_columns.get("mask", np.ones(int(batch.loss_mask.sum()), bool))
        return {"tokens": float(max(1, mask.sum()))}

    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        assert view.values is not None
        values, columns = view.values.double(), view.token_columns
        returns, old = columns["returns"], columns["old_values"]
        mask = columns.get("mask")
        weights = values.new_ones(values.shape) if mask is None else mask.double()
        plain = (values - returns).square()
        worst = plain
        if self.cliprange_value is not None:
            clipped = old + (values - old).clamp(-self.cliprange_value, self.cliprange_value)
            worst = plain.maximum((clipped - returns).square())
        value_loss = 0.5 * (worst * weights).sum() / totals["tokens"]
        tokens = weights.sum()
        metrics: MetricSums = {
            "value_loss": (value_loss.detach(), 0.0),
            "value_clip_ratio": (((worst > plain).double() * weights).sum(), tokens),
            "values/mean": ((values.detach() * weights).sum(), tokens),
            "returns/mean": ((returns * weights).sum(), tokens),
        }
        return self.vf_coef * value_loss, metrics


def explained_variance(values: np.ndarray, returns: np.ndarray, mask: np.ndarray | None = None) -> float:
    """1 - Var(R - V) / Var(R) over tokens: 1 is a perfect critic, 0 one that knows the mean only.

    0 where the returns do not vary: there is nothing to explain.
    """
    counted = np.ones(len(values), bool) if mask is None else mask
    spread = float(np.var(returns[counted])) if counted.any() else 0.0
    return 1 - float(np.var((returns - values)[counted])) / spread if spread > 0 else 0.0

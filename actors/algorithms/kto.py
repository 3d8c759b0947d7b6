"""KTO: preferences without pairs. Each answer is desirable or not; the reference point is a divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from actors.algorithms.loss import Loss, MetricSums, TokenView, Totals
from actors.batches.batch import Batch
from actors.spec import Spec

if TYPE_CHECKING:
    import torch

LABEL = "label"
"""Column of a row's verdict: true where its answer is desirable."""


class KtoSettings(Spec):
    """Settings of KTO."""

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Strength of the pull to the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`kto`, or `apo_zero_unpaired` (arXiv 2408.06266, eq. 7), which has no reference point: where desirable
    answers are better than the policy's own."""
    desirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Weight of desirable rows. KTO's authors keep (weight x number) of these between 1 and 4/3 of that of
    undesirable ones."""
    undesirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Weight of undesirable rows."""

    @property
    def has_reference_point(self) -> bool:
        """It reads each prompt with the answer of another row too."""
        return self.loss_type == "kto"

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Columns of the reference's log-probabilities, one for each sequence of a row."""
        return ("ref_logps", "ref_kl_logps") if self.has_reference_point else ("ref_logps",)


class KtoLoss(KtoSettings, Loss):
    """Kahneman-Tversky optimisation and unpaired APO-zero, as TRL 1.16's KTOTrainer has them.

    With d the log-ratio of a completion to the reference and z the reference point, 1 - sigmoid(beta (d - z))
    for desirable rows and 1 - sigmoid(beta (z - d)) for others, mean over rows (arXiv 2402.01306, eq. 7).
    z = max(0, mean of the log-ratios of mismatched rows): each prompt of the batch with the answer of
    another one; no gradient flows through it.

    Rows of the batch that a host is given: for `kto` two sequences, the row and the mismatched one, with
    `label`, `ref_logps` and `ref_kl_logps`; for `apo_zero_unpaired` the row alone.
    """

    uses_dropout: ClassVar[bool] = False

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (LABEL, *self.reference_columns, *(("kl_logps",) if self.has_reference_point else ()))

    def completed(self, batch: Batch, logprobs: Callable[[Batch], np.ndarray]) -> Batch:
        if not self.has_reference_point or batch.sequences_per_row == 1:
            return batch
        matched, mismatched = (sequences(batch, place) for place in (0, 1))
        return matched.with_columns(kl_logps=logprobs(mismatched))

    def totals(self, batch: Batch) -> Totals:
        desirable = float(batch.columns[LABEL].sum())
        totals = {
            "rows": float(max(1, batch.n_rows)),
            "chosen": desirable,
            "rejected": batch.n_rows - desirable,
            "kl": 0.0,
        }
        if self.has_reference_point and batch.n_rows:
            totals["kl"] = max(0.0, float((batch.columns["kl_logps"] - batch.columns["ref_kl_logps"]).mean()))
        return totals

    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        import torch

        desirable = view.columns[LABEL].bool()
        logps = view.sequence_sums(view.logps.double())
        ratio = logps - view.columns["ref_logps"]
        sign = torch.where(desirable, 1.0, -1.0).double()
        losses = 1 - torch.sigmoid(self.beta * sign * (ratio - totals["kl"]))
        weights = torch.where(desirable, self.desirable_weight, self.undesirable_weight).double()
        return (weights * losses).sum() / totals["rows"], self._metrics(view, logps, ratio, totals)

    def _metrics(
        self, view: TokenView, logps: torch.Tensor, ratio: torch.Tensor, totals: Totals
    ) -> MetricSums:
        """TRL's names; of a kind of row that the batch has none of, none."""
        kinds = {"chosen": view.columns[LABEL].bool(), "rejected": ~view.columns[LABEL].bool()}
        rewards, logps = self.beta * ratio.detach(), logps.detach()
        metrics: MetricSums = {"entropy": (view.entropy.sum(), float(view.logps.numel()))}
        # The mean over all rows, from each part of them: shares of a global value.
        metrics["kl"] = (ratio.new_tensor(totals["kl"]) * view.n_rows / totals["rows"], 0.0)
        means = {}
        for name, rows in kinds.items():
            if totals[name] == 0:
                continue
            n, mine = float(rows.sum()), rows[view.sequence]
            metrics[f"rewards/{name}"] = (rewards[rows].sum(), n)
            metrics[f"logps/{name}"] = (logps[rows].sum(), n)
            metrics[f"logits/{name}"] = ((view.mean_logits * mine).sum(), mine.sum())
            means[name] = rewards[rows].sum() / totals[name]
        if len(means) == 2:
            metrics["rewards/margins"] = (means["chosen"] - means["rejected"], 0.0)
        return metrics


def sequences(batch: Batch, place: int) -> Batch:
    """Sequence number `place` of every row, a row each, with the columns of the rows."""
    single = replace(batch, sequences_per_row=1, columns={})
    found = single.select(np.arange(batch.n_rows) * batch.sequences_per_row + place)
    return replace(found, columns=batch.columns)

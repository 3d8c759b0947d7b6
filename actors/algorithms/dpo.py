"""Direct preference optimisation and its relatives: options, checks, and the loss of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from actors.algorithms.loss import Loss, MetricSums, SamplingTemperature, TokenView, Totals
from actors.batches.batch import Batch
from actors.errors import InvariantViolation
from actors.spec import Spec

if TYPE_CHECKING:
    import torch

    from actors.algorithms.preference import Pairs

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "cdpo",
]  # fmt: skip


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


LossTypes = Annotated[
    list[LossType],
    Field(min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=LossType | list[LossType]),
]
SORTED = frozenset({"aot", "aot_unpaired"})
"""Losses that sort the batch: they need every row of every rank at once."""
SMOOTHED = frozenset({"cdpo", "robust", "exo_pair", "aot", "aot_unpaired"})
"""Losses that read `label_smoothing`."""
DIVERGENT = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "cdpo"}
)
"""Losses of the score difference: for others the beta log Z(x) of another f-divergence stays."""


class DpoSettings(Spec):
    """Settings of a preference loss, on pairs from the data or of the policy's own samples.

    WPO: arXiv 2406.11827; LD-DPO: arXiv 2409.06411.
    """

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Strength of the pull to the reference (tau in IPO)."""
    loss_type: LossTypes = Field(default=["sigmoid"])
    """One of TRL's losses or cdpo, or a list of them, added up by `loss_weights`."""
    loss_weights: list[float] | None = None
    """Weight of each loss in `loss_type`; null: 1 each."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of flipped preferences assumed by cdpo and robust (below 0.5); epsilon of exo_pair."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence between policy and reference (f-DPO)."""
    f_alpha_divergence_coef: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Alpha of alpha_divergence."""
    use_weighting: bool = False
    """Weight pairs by the policy's length-normalized probabilities (WPO)."""
    discopop_tau: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    """Temperature of discopop."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the tokens beyond the shorter answer's length (LD-DPO); null: 1."""

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Columns of the reference's log-probabilities, one for each sequence of a row."""
        return ("ref_chosen_logps", "ref_rejected_logps")

    def loss_problems(self) -> Iterator[tuple[str, str]]:
        """Settings that don't go together: (key, what is wrong with it)."""
        losses, smoothing = self.loss_type, self.label_smoothing
        if self.loss_weights is not None and len(self.loss_weights) != len(losses):
            yield (
                "loss_weights",
                f"has {len(self.loss_weights)} weights for {len(losses)} losses (loss_type: "
                f"{', '.join(losses)})",
            )
        halved = [name for name in losses if name in ("cdpo", "robust")]
        if halved and smoothing >= 0.5:
            yield (
                "label_smoothing",
                f"{smoothing:g}: {' and '.join(halved)} need a share of flipped pairs below 0.5",
            )
        if "exo_pair" in losses and smoothing == 0:
            yield "label_smoothing", "exo_pair needs label_smoothing above 0; its paper recommends 1e-3"
        if smoothing > 0 and not SMOOTHED & set(losses):
            yield (
                "label_smoothing",
                f"has no effect on {', '.join(losses)}; for sigmoid with label smoothing write "
                "`loss_type: cdpo`",
            )
        without = [name for name in losses if name not in DIVERGENT]
        if self.f_divergence_type != "reverse_kl" and without:
            yield (
                "f_divergence_type",
                f"{self.f_divergence_type} is not defined for {', '.join(without)}; it works with: "
                f"{', '.join(sorted(DIVERGENT))}",
            )
        unweighted = [name for name in losses if name in SORTED | {"sft"}]
        if self.use_weighting and unweighted:
            yield (
                "use_weighting",
                f"weights single pairs, and there are none in {' and '.join(unweighted)}",
            )


class DpoLoss(DpoSettings, Loss):
    """Preference losses under TRL's names; several are summed with weights."""

    uses_dropout: ClassVar[bool] = False

    @property
    def separable(self) -> bool:
        return not SORTED & set(self.loss_type)

    @property
    def required_columns(self) -> tuple[str, ...]:
        return self.reference_columns

    @property
    def terms(self) -> list[tuple[str, float]]:
        """Each loss with its weight."""
        weights = self.loss_weights if self.loss_weights is not None else [1.0] * len(self.loss_type)
        return list(zip(self.loss_type, weights, strict=True))

    def totals(self, batch: Batch) -> Totals:
        return {
            "rows": float(max(1, batch.n_rows)),
            "chosen_tokens": float(max(1, batch.label_counts[0::2].sum())),
        }

    def start_value(self) -> float | None:
        """The loss while policy and reference are equal, without `sft` terms; None if it depends on the data.

        ln 2 for sigmoid, cdpo and robust.
        """
        if self.use_weighting:
            return None
        eps, ln2 = self.label_smoothing, math.log(2)
        values = {
            "sigmoid": ln2, "cdpo": ln2, "robust": ln2, "aot": ln2, "aot_unpaired": ln2, "sigmoid_norm": ln2,
            "hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0, "nca_pair": 2 * ln2, "bco_pair": 2 * ln2,
            "ipo": 0.25 / self.beta**2, "sppo_hard": 0.5 / self.beta**2, "discopop": 0.5 * ln2 + 0.5,
            "exo_pair": -ln2 - 0.5 * (math.log1p(-eps) + math.log(eps)) if eps > 0 else 0.0, "sft": 0.0,
        }  # fmt: skip
        return sum(weight * values[name] for name, weight in self.terms)

    def check_start(self, metrics: dict[str, float], tolerance: float) -> None:
        """Hold the first step's metrics against `start_value`.

        Args:
            metrics: of the first update, with the weighted auxiliary loss apart in `aux_loss_term`.
            tolerance: relative to the expected value (1e-4 in float32, 5e-2 in bfloat16).

        Raises:
            InvariantViolation: the reference is not what the policy started from.
        """
        expected = self.start_value()
        if expected is None:
            return
        sft = sum(weight for name, weight in self.terms if name == "sft") * metrics.get("loss/sft", 0.0)
        found = metrics["loss"] - sft - metrics.get("aux_loss_term", 0.0)
        if not abs(found - expected) <= tolerance * max(1.0, abs(expected)):
            raise InvariantViolation(
                "policy", "first DPO step", f"the loss is {found:.6f} where equal policy and reference give "
                f"{expected:.6f}: the reference is not what the policy started from",
                "check `init` and `reference` of the stage, and remove stale reference log-probabilities",
            )  # fmt: skip

    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        import torch

        from actors.algorithms import preference

        pairs = _pairs(view, self)
        loss = torch.zeros((), dtype=torch.float64, device=view.logps.device)
        metrics: MetricSums = {}
        for name, weight in self.terms:
            if name == "sft":
                chosen = (view.sequence % 2 == 0).to(view.logps.dtype)
                term = -(view.logps * chosen).sum() / totals["chosen_tokens"]
            else:
                values = preference.PAIR_LOSSES[name](pairs, self)
                if self.use_weighting:
                    values = values * _wpo_weights(view)
                term = values.sum() / totals["rows"]
            loss = loss + weight * term
            if len(self.loss_type) > 1:
                metrics[f"loss/{name}"] = (term.detach(), 0.0)
        metrics.update(_pair_metrics(view, pairs, self.beta))
        return loss, metrics


class OnlineDpoLoss(SamplingTemperature, DpoLoss):
    """DPO on pairs of the policy's own samples. A step may have few pairs, or none to learn from."""

    gradient_may_vanish: ClassVar[bool] = True

    def check_start(self, metrics: dict[str, float], tolerance: float) -> None:
        if metrics["pairs"] > 0:
            super().check_start(metrics, tolerance)

    def totals(self, batch: Batch) -> Totals:
        return {**super().totals(batch), "pairs": float(batch.n_rows)}

    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        loss, metrics = super().__call__(view, totals)
        if not totals["pairs"]:  # Means over nothing would pull the step's down.
            metrics = {}
        metrics["pairs"] = (loss.new_tensor(float(view.n_rows)), 0.0)
        return loss, metrics


def sequence_logps(view: TokenView, ld_alpha: float | None) -> torch.Tensor:
    """float64 (S,): log-probability of each completion; rewards are small differences of these sums.

    With `ld_alpha`, tokens beyond the length that both answers of a pair share are scaled by it.
    """
    if ld_alpha is None:
        return view.sequence_sums(view.logps.double())
    counts = view.counts()
    starts = counts.cumsum(0) - counts
    place = starts.new_ones(view.sequence.numel()).cumsum(0) - 1 - starts[view.sequence]
    shared = counts.view(-1, 2).min(dim=1).values.repeat_interleave(2)
    weights = (place < shared[view.sequence]).double()
    return view.sequence_sums(view.logps.double() * (weights + ld_alpha * (1 - weights)))


def ld_weights(batch: Batch, ld_alpha: float) -> np.ndarray:
    """float64 (counted tokens,): the weights of `sequence_logps`, for log-probabilities as numpy."""
    counts = batch.label_counts
    shared = np.repeat(counts.reshape(-1, 2).min(axis=1), 2)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.where(place < np.repeat(shared, counts), 1.0, ld_alpha)


def _pairs(view: TokenView, loss: DpoLoss) -> Pairs:
    from actors.algorithms.preference import Pairs, scores

    logps = sequence_logps(view, loss.ld_alpha)
    counts = view.counts()
    chosen, rejected = logps[0::2], logps[1::2]
    ref_chosen, ref_rejected = view.columns["ref_chosen_logps"], view.columns["ref_rejected_logps"]
    kind, alpha = loss.f_divergence_type, loss.f_alpha_divergence_coef
    return Pairs(
        chosen, rejected, ref_chosen, ref_rejected, counts[0::2], counts[1::2],
        scores(chosen - ref_chosen, kind, alpha), scores(rejected - ref_rejected, kind, alpha),
    )  # fmt: skip


def _wpo_weights(view: TokenView) -> torch.Tensor:
    """(R,): product over the pair of the geometric mean of p(token) / sum p^2 (WPO, eq. 2)."""
    aligned = view.sequence_sums(view.logps.detach() - view.log_sum_sq)
    weights = (aligned / view.counts().clamp(min=1)).exp()
    return weights[0::2] * weights[1::2]


def _pair_metrics(view: TokenView, pairs: Pairs, beta: float) -> MetricSums:
    rows, tokens = float(view.n_rows), float(view.logps.numel())
    is_chosen = view.sequence % 2 == 0
    n_chosen, n_rejected = pairs.chosen_lengths.sum(), pairs.rejected_lengths.sum()
    chosen_mean_logits = (view.mean_logits * is_chosen).sum()
    chosen, rejected = beta * pairs.c.detach(), beta * pairs.r.detach()
    return {
        "entropy": (view.entropy.sum(), tokens),
        "mean_token_accuracy": ((view.correct & is_chosen).sum(), n_chosen),
        "logits/chosen": (chosen_mean_logits, n_chosen),
        "logits/rejected": (view.mean_logits.sum() - chosen_mean_logits, n_rejected),
        "rewards/chosen": (chosen.sum(), rows),
        "rewards/rejected": (rejected.sum(), rows),
        "rewards/accuracies": ((chosen > rejected).sum(), rows),
        "rewards/margins": ((chosen - rejected).sum(), rows),
        "logps/chosen": (pairs.chosen_logps.detach().sum(), rows),
        "logps/rejected": (pairs.rejected_logps.detach().sum(), rows),
    }

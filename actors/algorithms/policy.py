"""Policy losses of the online stage: clipped surrogates, KL to the reference, entropy bonus.

For tokens t of sample i, with r the importance ratio to the policy that is being left:
loss = aggregate over tokens of [-surrogate(r, A) + beta KL] - entropy_coef * mean entropy.
`loss_type` names a row of `POLICY_LOSSES`: surrogate and aggregate; `importance_sampling_level` what r is a
ratio of.
Ratios are computed in float64 from stored log-probabilities; masked tokens count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from actors.algorithms import checks as rl_checks
from actors.algorithms.importance_sampling import CORRECTION
from actors.algorithms.kl import KL_ESTIMATORS
from actors.algorithms.loss import Loss, MetricSums, SamplingTemperature, TokenView, Totals, largest
from actors.algorithms.policy_losses import POLICY_LOSSES, Counted, Level, PolicyLossRow, PolicySettings
from actors.batches.batch import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class PolicyLoss(PolicySettings, SamplingTemperature, Loss):
    """Policy gradient with importance ratios.

    Token columns read: `old_logps` (but see `on_policy`), `advantages`; `importance_sampling_ratio` if there
    (what each token's surrogate is multiplied by: see `actors.algorithms.importance_sampling`); `ref_logps`
    if there (then the KL is a metric, and with beta a term of the loss); `mask` (bool) if there: False takes
    a token out of loss, metrics and totals.
    """

    uses_dropout: ClassVar[bool] = False
    gradient_may_vanish: ClassVar[bool] = True

    max_completion_length: int | None = Field(default=None, ge=1)
    """Most new tokens of a sample."""
    on_policy: bool = False
    """The policy that is left is the one that this very pass computes: the only optimizer step of a
    generation needs no pass before it. Column `old_logps`, if there, is then held against it
    (`ratio/max_deviation`), and `engine_logps` is compared with it (`mismatch/...`)."""
    mismatch_limits: tuple[float, float] | None = None
    """Of on_policy: the most that `mismatch/k3` and `mismatch/beyond_2x` may be for the weights to move."""
    ratio_tolerance: float = rl_checks.RATIO_TOLERANCE["float32"]
    """Of `ratio/beyond`: see `rl_checks.check_first_ratio`."""

    @property
    def row(self) -> PolicyLossRow:
        """The row of its `loss_type`."""
        return POLICY_LOSSES[self.loss_type]

    @property
    def needs_entropy_gradient(self) -> bool:
        return self.entropy_coef > 0

    @property
    def required_columns(self) -> tuple[str, ...]:
        columns = ["engine_logps" if self.on_policy else "old_logps", "advantages"]
        if self.beta > 0:
            columns.append("ref_logps")
        return (*columns, *self.row.required_columns)

    def totals(self, batch: Batch) -> Totals:
        """`divisor` of the row, and `tokens` that count."""
        mask = batch.token_columns.get("mask", np.ones(int(batch.loss_mask.sum()), bool))
        counted = Counted(batch, float(max(1, mask.sum())), self.max_completion_length)
        return {"divisor": self.row.divisor(counted), "tokens": counted.tokens}

    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        weights, level = _weights(view), self.importance_sampling_level
        old = view.logps.detach().double() if self.on_policy else view.token_columns["old_logps"]
        log_ratio = _log_ratio(view, view.logps, old, weights, level)
        ratio = log_ratio.exp()
        advantages = view.token_columns["advantages"].double()
        surrogate = self.row.surrogate(ratio, view.logps.double(), advantages, self)
        per_token = surrogate.loss
        if CORRECTION in view.token_columns:
            per_token = per_token * view.token_columns[CORRECTION]
        kl = self._kl(view, ratio)
        if self.beta > 0:
            assert kl is not None
            per_token = per_token + self.beta * kl
        loss = (per_token * weights * self._share(view, weights)).sum() / totals["divisor"]
        metrics = _metrics(view, weights, ratio.detach(), log_ratio.detach(), kl)
        shares = {name: clipped.double() for name, clipped in surrogate.clipped.items()}
        metrics |= {name: ((share * weights).sum(), weights.sum()) for name, share in shares.items()}
        if self.on_policy:
            metrics |= _mismatch(view)
        if "old_logps" in view.token_columns:
            known = view.token_columns["old_logps"]
            metrics |= beyond(view, known, weights, self.ratio_tolerance)
            if self.on_policy:
                log_ratio = _log_ratio(view, view.logps.detach(), known, weights, level)
                metrics |= _deviation(log_ratio.exp(), weights)
        if self.entropy_coef > 0:
            metrics["policy_loss"] = (loss.detach(), 0.0)
            loss = loss - self.entropy_coef * (view.entropy * weights).sum() / totals["tokens"]
        return loss, metrics

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raises: InvariantViolation: engine and policy are farther apart than `mismatch_limits`."""
        if self.mismatch_limits is not None:
            rl_checks.check_mismatch(metrics, *self.mismatch_limits)

    def _kl(self, view: TokenView, ratio: Tensor) -> Tensor | None:
        """(T,): estimated KL to the reference, with gradient; None without a reference."""
        if "ref_logps" not in view.token_columns:
            return None
        kl = KL_ESTIMATORS[self.kl_estimator](view.logps.double() - view.token_columns["ref_logps"])
        return kl * ratio if self.use_bias_correction_kl else kl

    def _share(self, view: TokenView, weights: Tensor) -> Tensor | float:
        """Weight of a token in the aggregate: 1 / tokens of its sample where the row says so, else 1."""
        if not self.row.mean_by_sample:
            return 1.0
        return 1 / view.sequence_sums(weights).clamp(min=1)[view.sequence]


def _weights(view: TokenView) -> Tensor:
    """float64 (T,): 1 for tokens that count, 0 for masked ones."""
    mask = view.token_columns.get("mask")
    return view.logps.new_ones(view.logps.shape).double() if mask is None else mask.double()


def _log_ratio(view: TokenView, logps: Tensor, old: Tensor, weights: Tensor, level: Level) -> Tensor:
    """float64 (T,): log-ratio of the policy to the one that `old` are of.

    token: its own. trajectory: the sum over its sample. sequence: the mean over its sample (GSPO,
    arXiv 2507.18071). The latter two are the same for all tokens of a sample.
    """
    of_tokens = logps.double() - old
    if level == "token":
        return of_tokens
    of_samples = view.sequence_sums(of_tokens * weights)
    if level == "sequence":
        of_samples = of_samples / view.sequence_sums(weights).clamp(min=1)
    return of_samples[view.sequence]


def _metrics(
    view: TokenView,
    weights: Tensor,
    ratio: Tensor,
    log_ratio: Tensor,
    kl: Tensor | None,
) -> MetricSums:
    """TRL's names, over counted tokens; `approx_kl` is k3 of the policy that is left to the new one."""
    tokens = weights.sum()
    metrics: MetricSums = {
        "entropy": ((view.entropy.detach() * weights).sum(), tokens),
        "ratio/mean": ((ratio * weights).sum(), tokens),
        **_deviation(ratio, weights),
        "approx_kl": (((log_ratio.expm1() - log_ratio) * weights).sum(), tokens),
    }
    if kl is not None:
        metrics["kl"] = ((kl.detach() * weights).sum(), tokens)
    return metrics


def _deviation(ratio: Tensor, weights: Tensor) -> MetricSums:
    return {"ratio/max_deviation": largest((ratio - 1).abs() * weights)}


def beyond(view: TokenView, old: Tensor, weights: Tensor, tolerance: float) -> MetricSums:
    """Shares of tokens whose log-probability is farther off `old` than `tolerance` and than a tenth of it, as
    a share of it where it is beyond 1. What is no number is beyond both."""
    off = (view.logps.detach().double() - old).abs() / old.abs().clamp(min=1)
    bounds = {"ratio/beyond": tolerance, "ratio/beyond_tenth": tolerance / 10}
    tokens = weights.sum()
    return {name: ((~(off <= bound)).double().mul(weights).sum(), tokens) for name, bound in bounds.items()}


def _mismatch(view: TokenView) -> MetricSums:
    """`rl_checks.mismatch_metrics` of the engine's log-probabilities to the policy's, over all tokens."""
    d = view.token_columns["engine_logps"].double() - view.logps.detach().double()
    tokens, far = float(len(d)), d.abs() > math.log(2)
    return {
        "mismatch/k1": (d.sum(), tokens),
        "mismatch/k3": (((-d).expm1() + d).sum(), tokens),
        "mismatch/max": largest(d.abs()),
        "mismatch/beyond_2x": (far.double().sum(), tokens),
    }

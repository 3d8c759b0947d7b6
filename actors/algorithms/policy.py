"""Policy losses of the online stage: clipped surrogates, KL to the reference, entropy bonus.

For tokens t of sample i, with r the importance ratio to the policy that is being left:
loss = aggregate over tokens of [-surrogate(r, A) + beta KL] - entropy_coef * mean entropy.
`loss_type` names the aggregate and, for cispo, the surrogate; `importance_sampling_level` what r is a ratio
of.
Ratios are computed in float64 from stored log-probabilities; masked tokens count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from actors.algorithms import checks as rl_checks
from actors.algorithms.importance_sampling import CORRECTION
from actors.algorithms.kl import KL_ESTIMATORS, KlEstimator
from actors.algorithms.loss import Loss, MetricSums, TokenView, Totals, largest
from actors.batches.batch import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
Level = Literal["token", "sequence", "trajectory"]


@dataclass(frozen=True)
class Surrogate:
    """What a policy loss comes to at each token; every tensor is (T,)."""

    loss: Tensor
    """To be minimised, with gradient."""
    low_clipped: Tensor
    """bool: the ratio is below the range where the advantage is negative: no gradient."""
    high_clipped: Tensor
    """bool: above the range where the advantage is positive."""


def ppo_clip(ratio: Tensor, logps: Tensor, advantages: Tensor, spec: PolicyLoss) -> Surrogate:
    """-min(r A, clip(r, 1 - eps, 1 + eps_high) A) (PPO, arXiv 1707.06347, eq. 7).

    With `delta`, r is at most delta in the unclipped term: it bounds the loss of a negative advantage at
    -delta A (dual-clip PPO, arXiv 1912.09729; TRL's two-sided clipping).
    """
    low, high = 1 - spec.epsilon, 1 + spec.upper_epsilon
    clipped = ratio.clamp(low, high)
    bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    return Surrogate(
        -(bounded * advantages).minimum(clipped * advantages),
        (ratio < low) & (advantages < 0),
        (ratio > high) & (advantages > 0),
    )


def cispo(ratio: Tensor, logps: Tensor, advantages: Tensor, spec: PolicyLoss) -> Surrogate:
    """-stopgrad(min(r, eps_max)) A log p (CISPO: MiniMax-M1, arXiv 2506.13585, eq. 4; with the upper bound
    only, as ScaleRL, arXiv 2510.13786, and TRL have it).

    The weight of a token is clipped, never its gradient. `epsilon_high` is eps_max itself.
    """
    assert spec.epsilon_high is not None
    bounded = ratio.clamp(max=spec.epsilon_high).detach()
    high = (ratio > spec.epsilon_high) & (advantages > 0)
    return Surrogate(-bounded * advantages * logps, high.new_zeros(high.shape), high)


PolicySurrogate = Callable[["Tensor", "Tensor", "Tensor", "PolicyLoss"], Surrogate]
"""(ratio, log-probabilities with gradient, advantages, each float64 (T,); settings) -> loss of each token."""
POLICY_LOSSES: dict[LossType, PolicySurrogate] = {
    "grpo": ppo_clip,
    "bnpo": ppo_clip,
    "dr_grpo": ppo_clip,
    "dapo": ppo_clip,
    "cispo": cispo,
}
"""Surrogate of every `loss_type`."""


class PolicyLoss(Loss):
    """Policy gradient with importance ratios.

    Token columns read: `old_logps` (but see `on_policy`), `advantages`; `importance_sampling_ratio` if there
    (what each token's surrogate is multiplied by: see `actors.algorithms.importance_sampling`); `ref_logps`
    if there (then the KL is a metric, and with beta a term of the loss); `mask` (bool) if there: False takes
    a token out of loss, metrics and totals.
    """

    uses_dropout: ClassVar[bool] = False
    gradient_may_vanish: ClassVar[bool] = True

    epsilon: float = Field(default=0.2, gt=0)
    """The ratio is clipped at 1 - epsilon."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """The ratio is clipped at 1 + epsilon_high (null: epsilon); of cispo the bound itself."""
    delta: float | None = Field(default=None, gt=1)
    """Dual clip: bound of the loss of a negative advantage, in advantages; null: none."""
    importance_sampling_level: Level = "token"
    """What the ratio is of: a token, a sequence (mean log-ratio: GSPO), a trajectory (their sum: RLOO)."""
    loss_type: LossType = "dapo"
    """Aggregate: grpo mean of each sample's mean; bnpo mean over tokens; dr_grpo sum over tokens / (samples x
    max_completion_length); dapo mean over tokens with the generation batch's mean count; cispo as dapo, with
    weights that are clipped in place of the surrogate."""
    max_completion_length: int | None = Field(default=None, ge=1)
    """Divisor of dr_grpo."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference in the loss; 0: none."""
    kl_estimator: KlEstimator = "k3"
    """Estimator of that KL, and of the metric `kl`."""
    use_bias_correction_kl: bool = True
    """Multiply that KL by the ratio, gradient included: it is then the KL of the new policy estimated on the
    old one's tokens, and its gradient that of KL(policy || reference) (arXiv 2512.02556)."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the mean token entropy, which is taken off the loss."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature: logits are divided by it."""
    on_policy: bool = False
    """The policy that is left is the one that this very pass computes: the only optimizer step of a
    generation needs no pass before it. Column `old_logps`, if there, is then held against it
    (`ratio/max_deviation`), and `engine_logps` is compared with it (`mismatch/...`)."""
    mismatch_limits: tuple[float, float] | None = None
    """Of on_policy: the most that `mismatch/k3` and `mismatch/beyond_2x` may be for the weights to move."""

    @model_validator(mode="after")
    def _options_fit(self) -> PolicyLoss:
        problems = []
        if self.delta is not None and self.delta <= 1 + self.upper_epsilon:
            problems.append(f"delta must be above 1 + epsilon_high = {1 + self.upper_epsilon:g}")
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            problems.append(
                "cispo bounds the ratio at epsilon_high itself: set it, to 1 or more (5 is usual)"
            )
        if self.loss_type == "cispo" and self.delta is not None:
            problems.append("delta bounds a clipped surrogate, which cispo has not: leave it out")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            problems.append("dr_grpo divides by max_completion_length: set it")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def upper_epsilon(self) -> float:
        """How far above 1 the ratio may be."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def logit_temperature(self) -> float:
        return self.temperature

    @property
    def needs_entropy_gradient(self) -> bool:
        return self.entropy_coef > 0

    @property
    def required_columns(self) -> tuple[str, ...]:
        columns = ["engine_logps" if self.on_policy else "old_logps", "advantages"]
        if self.beta > 0:
            columns.append("ref_logps")
        if self.loss_type in ("dapo", "cispo"):
            columns.append("tokens_per_step")
        return tuple(columns)

    def totals(self, batch: Batch) -> Totals:
        """`divisor` of the aggregate, and `tokens` that count.

        dapo and cispo divide by the row column `tokens_per_step`: the counted tokens of the whole
        generation batch over its number of optimizer steps (the same number in every row).
        """
        mask = batch.token_columns.get("mask", np.ones(int(batch.loss_mask.sum()), bool))
        rows, tokens = float(max(1, batch.n_rows)), float(max(1, mask.sum()))
        divisors = {"grpo": rows, "bnpo": tokens, "dr_grpo": rows * (self.max_completion_length or 1)}
        if self.loss_type in ("dapo", "cispo"):
            per_step = batch.columns["tokens_per_step"]
            divisors[self.loss_type] = float(max(1.0, per_step.max(initial=0.0)))
        return {"divisor": divisors[self.loss_type], "tokens": tokens}

    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        weights, level = _weights(view), self.importance_sampling_level
        old = view.logps.detach().double() if self.on_policy else view.token_columns["old_logps"]
        log_ratio = _log_ratio(view, view.logps, old, weights, level)
        ratio = log_ratio.exp()
        advantages = view.token_columns["advantages"].double()
        surrogate = POLICY_LOSSES[self.loss_type](ratio, view.logps.double(), advantages, self)
        per_token = surrogate.loss
        if CORRECTION in view.token_columns:
            per_token = per_token * view.token_columns[CORRECTION]
        kl = self._kl(view, ratio)
        if self.beta > 0:
            assert kl is not None
            per_token = per_token + self.beta * kl
        loss = (per_token * weights * self._share(view, weights)).sum() / totals["divisor"]
        metrics = _metrics(view, weights, ratio.detach(), log_ratio.detach(), kl)
        metrics |= self._clipped(surrogate, weights)
        if self.on_policy:
            metrics |= _mismatch(view)
            if "old_logps" in view.token_columns:
                known = _log_ratio(view, view.logps.detach(), view.token_columns["old_logps"], weights, level)
                metrics |= _deviation(known.exp(), weights)
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

    def _clipped(self, surrogate: Surrogate, weights: Tensor) -> MetricSums:
        """TRL's names for the share of tokens whose ratio was clipped."""
        tokens = weights.sum()
        low, high = surrogate.low_clipped.double(), surrogate.high_clipped.double()
        if self.loss_type == "cispo":
            return {"cispo_clip_ratio": ((high * weights).sum(), tokens)}
        return {
            "clip_ratio/low_mean": ((low * weights).sum(), tokens),
            "clip_ratio/high_mean": ((high * weights).sum(), tokens),
            "clip_ratio/region_mean": (((low + high) * weights).sum(), tokens),
        }

    def _share(self, view: TokenView, weights: Tensor) -> Tensor | float:
        """What a token weighs in the aggregate: 1 / tokens of its sample for `grpo`, else 1."""
        if self.loss_type != "grpo":
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

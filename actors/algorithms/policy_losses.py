"""The table of policy losses, and the settings that they read.

A row of `POLICY_LOSSES` is a whole policy loss: its surrogate, what the sum over tokens is divided by, the
columns that it needs, and the settings that don't go with it. The choices of `loss_type`, its description,
the schema and the rules of a run's config follow from the table; `PolicyLoss` computes any row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from actors.algorithms.kl import KlEstimator
from actors.batches.batch import Batch
from actors.spec import KeyOf, Spec

if TYPE_CHECKING:
    from torch import Tensor

Level = Literal["token", "sequence", "trajectory"]
TOKENS_PER_STEP = "tokens_per_step"
"""Row column: counted tokens of the whole generation batch over its number of optimizer steps, the same
number in every row."""


@dataclass(frozen=True)
class Surrogate:
    """Values of a policy loss at each token."""

    loss: Tensor
    """(T,): to be minimised, with gradient."""
    clipped: dict[str, Tensor] = field(default_factory=dict)
    """Metric name -> bool (T,): tokens whose ratio is out of bounds where that takes their gradient or their
    weight; the metric is their share."""


def ppo_clip(ratio: Tensor, logps: Tensor, advantages: Tensor, spec: PolicySettings) -> Surrogate:
    """-min(r A, clip(r, 1 - eps, 1 + eps_high) A) (PPO, arXiv 1707.06347, eq. 7).

    With `delta`, r is at most delta in the unclipped term: it bounds the loss of a negative advantage at
    -delta A (dual-clip PPO, arXiv 1912.09729; TRL's two-sided clipping).
    """
    low, high = 1 - spec.epsilon, 1 + spec.upper_epsilon
    clipped = ratio.clamp(low, high)
    bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    return Surrogate(
        -(bounded * advantages).minimum(clipped * advantages),
        {
            "clip_ratio/low_mean": below,
            "clip_ratio/high_mean": above,
            "clip_ratio/region_mean": below | above,
        },
    )


def cispo(ratio: Tensor, logps: Tensor, advantages: Tensor, spec: PolicySettings) -> Surrogate:
    """-stopgrad(min(r, eps_max)) A log p (CISPO: MiniMax-M1, arXiv 2506.13585, eq. 4; with the upper bound
    only, as ScaleRL, arXiv 2510.13786, and TRL have it).

    The weight of a token is clipped, never its gradient. `epsilon_high` is eps_max itself.
    """
    assert spec.epsilon_high is not None
    bounded = ratio.clamp(max=spec.epsilon_high).detach()
    above = (ratio > spec.epsilon_high) & (advantages > 0)
    return Surrogate(-bounded * advantages * logps, {"cispo_clip_ratio": above})


@dataclass(frozen=True)
class Counted:
    """The global batch as a divisor sees it."""

    batch: Batch
    tokens: float
    """Tokens that the mask leaves, at least 1."""
    max_completion_length: int | None

    @property
    def samples(self) -> float:
        return float(max(1, self.batch.n_rows))


def samples(counted: Counted) -> float:
    return counted.samples


def tokens(counted: Counted) -> float:
    return counted.tokens


def full_samples(counted: Counted) -> float:
    return counted.samples * (counted.max_completion_length or 1)


def tokens_per_step(counted: Counted) -> float:
    return float(max(1.0, counted.batch.columns[TOKENS_PER_STEP].max(initial=0.0)))


Problems = Iterator[tuple[str, str]]
"""(key, what is wrong with it)."""


def clip_problems(spec: PolicySettings) -> Problems:
    """Settings that a clipped surrogate can't have."""
    high = 1 + spec.upper_epsilon
    if spec.delta is not None and spec.delta <= high:
        yield "delta", f"must be above 1 + epsilon_high = {high:g}, not {spec.delta:g}"


def cispo_problems(spec: PolicySettings) -> Problems:
    """Settings that CISPO can't have."""
    if spec.epsilon_high is None or spec.epsilon_high < 1:
        given = "null" if spec.epsilon_high is None else f"{spec.epsilon_high:g}"
        yield (
            "epsilon_high",
            f"{given}: cispo bounds the ratio at epsilon_high itself, not at 1 + epsilon_high; write 1 or "
            "more (5 is usual)",
        )
    if spec.delta is not None:
        yield "delta", "bounds a clipped surrogate, which cispo has not; leave it out"


PolicySurrogate = Callable[["Tensor", "Tensor", "Tensor", "PolicySettings"], Surrogate]
"""(ratio, log-probabilities with gradient, advantages, each float64 (T,); settings) -> loss of each token."""


@dataclass(frozen=True)
class PolicyLossRow:
    """One policy loss."""

    surrogate: PolicySurrogate
    divisor: Callable[[Counted], float]
    """Divisor of the sum over the tokens of the global batch."""
    says: str
    """Average of token losses, after "over": for the description of `loss_type`."""
    mean_by_sample: bool = False
    """A token weighs 1 / tokens of its sample, else 1."""
    required_settings: tuple[str, ...] = ()
    """Settings that must not be null."""
    required_columns: tuple[str, ...] = ()
    """Columns that the divisor or the surrogate read, beside those of every policy loss."""
    problems: Callable[[PolicySettings], Problems] = clip_problems
    """Settings that don't go with it."""


POLICY_LOSSES: dict[str, PolicyLossRow] = {
    "grpo": PolicyLossRow(ppo_clip, samples, "each sample and then over samples", mean_by_sample=True),
    "bnpo": PolicyLossRow(ppo_clip, tokens, "the tokens of an optimizer step"),
    "dapo": PolicyLossRow(
        ppo_clip,
        tokens_per_step,
        "the same by the generation's mean count",
        required_columns=(TOKENS_PER_STEP,),
    ),
    "dr_grpo": PolicyLossRow(
        ppo_clip,
        full_samples,
        "samples x max_completion_length",
        required_settings=("max_completion_length",),
    ),
    "cispo": PolicyLossRow(
        cispo,
        tokens_per_step,
        "tokens as dapo, but the ratio is a weight, bounded by `epsilon_high`, of each token's "
        "log-probability, and no token is left out",
        required_columns=(TOKENS_PER_STEP,),
        problems=cispo_problems,
    ),
}
"""Every `loss_type`. To add one: a row here, and one in docs/algorithms.md."""

LossType = Annotated[str, KeyOf(POLICY_LOSSES)]
AVERAGED = "Average of token losses, by TRL's names: " + "; ".join(
    f"`{name}` over {row.says}" for name, row in POLICY_LOSSES.items()
)


class PolicySettings(Spec):
    """Settings of every policy loss, by TRL's names."""

    beta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the KL divergence from the reference; 0: none is computed."""
    kl_estimator: KlEstimator = "k3"
    """Estimator of the divergence from the sampled tokens."""
    use_bias_correction_kl: bool = True
    """In a loss: multiply the estimate by the ratio, gradient included, so that its gradient is the
    divergence's own (arXiv 2512.02556). Without it k1 has a gradient of mean zero there and is refused."""
    epsilon: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    """The ratio to the sampling policy is clipped at 1 - epsilon ..."""
    epsilon_high: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """... and at 1 + epsilon_high; null: `epsilon`. With `loss_type: cispo` the bound itself (5 is usual)."""
    delta: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    """Bound of the ratio where the advantage is negative (dual clip); null: none."""
    importance_sampling_level: Level = "token"
    """Level of the ratio to the sampling policy: each `token`, the `sequence` (the mean of its
    log-ratios: GSPO), or the `trajectory` (their sum: RLOO)."""
    loss_type: LossType = Field(default="dapo", description=AVERAGED)
    entropy_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the entropy bonus, the mean entropy of tokens."""

    @property
    def upper_epsilon(self) -> float:
        """Distance above 1 that the ratio may have."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def loss_problems(self) -> Problems:
        """Settings that don't go together, by key."""
        row = POLICY_LOSSES[self.loss_type]
        for name in row.required_settings:
            if getattr(self, name) is None:
                yield name, f"null, and {self.loss_type} reads it: set it"
        yield from row.problems(self)
        if self.epsilon >= 1:
            yield "epsilon", f"{self.epsilon:g}: the ratio is clipped at 1 - epsilon, above 0"

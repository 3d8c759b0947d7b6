"""Advantages of samples: generalised advantage estimation, group-relative, leave-one-out, returns-to-go.

- Columns: tokens of all samples one after the other, `offsets` between samples; samples stand in groups of
  `num_generations`, one group a prompt.
- An episode is exactly a sample's counted tokens: what an environment said between two turns is no part of
  it, and the token before is followed by the one behind. Its last token is terminal, whether it is the
  end-of-turn token or the token limit: the value after it is 0 (as TRL's PPO and verl do; a reward model has
  scored the cut text as it is, and `missing_eos_penalty` and `mask_truncated_completions` are there for the
  rest).
- A sample without a reward (NaN) takes no part: it is in no mean and its advantage is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from actors.spec import KeyOf, Spec

ADVANTAGES: dict[str, Callable[[AdvantageSpec, Scored], Advantages]] = {}
"""Every kind of advantage; filled below, where the functions are."""
AdvantageKind = Annotated[str, KeyOf(ADVANTAGES)]
Whitening = Literal["none", "shift_and_scale", "scale"]
ScaleRewards = Literal["group", "batch", "none"]
MEAN_ROUNDING = 1e-14
"""Distance from a mean that is its rounding, as a share of the largest value: 45 units in the last place."""


class GroupSize(Spec):
    """Size of a group."""

    num_generations: int = Field(default=8, ge=1)
    """Samples per prompt."""


class WhitenSettings(Spec):
    """Normalisation of advantages."""

    whiten_advantages: Whitening = "none"
    """Normalise advantages over the samples of a generation: `shift_and_scale` to mean 0 and standard
    deviation 1 (unbiased), `scale` keeps the mean."""


class DiscountSettings(Spec):
    """Discount of later rewards."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""


class GaeSettings(DiscountSettings):
    """Settings of generalised advantage estimation."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation."""
    whiten_rewards: Whitening = "none"
    """Normalise the rewards per token, divergence included, before advantages are taken (`scale` is TRL's
    PPO)."""


class GroupSettings(Spec):
    """Settings of group-relative advantages."""

    scale_rewards: ScaleRewards = "group"
    """Divide by the standard deviation of the prompt's samples, of the whole generation, or by nothing."""


class ReinforceSettings(DiscountSettings):
    """Settings of returns-to-go."""

    baseline: Literal["none", "group"] = "none"
    """Taken off a sample's reward first: nothing, or the mean of its prompt's samples."""


class AdvantageSpec(GroupSize, WhitenSettings, GaeSettings, GroupSettings, ReinforceSettings):
    """Settings of all kinds of advantages; each kind reads its own."""

    kind: AdvantageKind = "group"
    """Key of `ADVANTAGES`: gae (PPO, needs values), group (GRPO), rloo or reinforce (REINFORCE++)."""


@dataclass(frozen=True)
class Scored:
    """Input of advantages: T tokens in N samples."""

    rewards: np.ndarray
    """float64 (N,): reward of each sample, NaN for none."""
    offsets: np.ndarray
    """int64 (N + 1,): tokens of sample `i` are `offsets[i]:offsets[i + 1]`; every sample has at least one."""
    token_rewards: np.ndarray
    """float64 (T,): rewards by token beside those of samples: minus beta KL, or 0."""
    values: np.ndarray | None = None
    """float64 (T,): the critic's value of the state before each token (gae)."""
    mask: np.ndarray | None = None
    """bool (T,): tokens that count in whitening; None: all of samples with a reward."""
    turn_rewards: np.ndarray | None = None
    """float64 (T,): the part of `rewards` that was earned by turns, at their last tokens; the rest is earned
    at the sample's last token. None: all of it is."""

    def __post_init__(self) -> None:
        if (self.lengths < 1).any():
            raise ValueError(f"samples {np.flatnonzero(self.lengths < 1).tolist()} have no token")

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def by_token(self, of_samples: np.ndarray) -> np.ndarray:
        """(N,) -> (T,)."""
        return np.repeat(of_samples, self.lengths)

    def by_sample(self, of_tokens: np.ndarray) -> np.ndarray:
        """(T,) -> (N,): sums."""
        sample = self.by_token(np.arange(len(self.rewards)))
        return np.bincount(sample, weights=of_tokens, minlength=len(self.rewards))

    def at_tokens(self, of_samples: np.ndarray) -> np.ndarray:
        """(N,) -> (T,): tokens' rewards, with these of samples where they were earned; NaN counts as 0."""
        rewards = np.array(self.token_rewards, dtype=np.float64)
        rest = np.nan_to_num(of_samples, nan=0.0)
        if self.turn_rewards is not None:
            rest = rest - self.by_sample(self.turn_rewards)
            rewards += self.turn_rewards
        rewards[self.offsets[1:] - 1] += rest
        return rewards

    def totals(self) -> np.ndarray:
        """float64 (N,): each sample's reward and its tokens' rewards, NaN for none."""
        return self.rewards + self.by_sample(self.token_rewards)

    def counted(self) -> np.ndarray:
        """bool (T,): tokens of samples with a reward that the mask leaves."""
        scored = self.by_token(~np.isnan(self.rewards))
        return scored if self.mask is None else scored & self.mask


@dataclass(frozen=True)
class Advantages:
    """Per token, float64 (T,)."""

    advantages: np.ndarray
    returns: np.ndarray | None = None
    """Targets of the critic (gae): advantages before whitening, plus values. The value itself for samples
    without a reward, so that the critic learns nothing from them."""


def gae(
    rewards: np.ndarray, values: np.ndarray, offsets: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_t+1 - V_t; A_t = delta_t + gamma lam A_t+1; V and A are 0 after the last token.

    Args:
        rewards, values: float64 (T,).
        offsets: int64 (N + 1,).

    Returns:
        Advantages and returns A + V, float64 (T,).
    """
    after = np.append(values[1:], 0.0)
    after[offsets[1:] - 1] = 0.0
    deltas = rewards + gamma * after - values
    advantages = np.zeros_like(deltas)
    lengths = np.diff(offsets)
    # All samples' last tokens at once, then all tokens before them: as many steps as the longest has tokens.
    for back in range(1, int(lengths.max(initial=0)) + 1):
        at = offsets[1:][lengths >= back] - back
        following = advantages[at + 1] if back > 1 else 0.0
        advantages[at] = deltas[at] + gamma * lam * following
    return advantages, advantages + values


def group_relative(rewards: np.ndarray, num_generations: int, scale: ScaleRewards) -> np.ndarray:
    """(r - mean of its group) / (std + 1e-4), float64 (N,) (GRPO, arXiv 2402.03300; TRL's epsilon).

    The standard deviation is unbiased: of the group, of the batch (arXiv 2508.08221), or left out
    (Dr. GRPO, arXiv 2503.20783). NaN rewards count nowhere and give 0.
    """
    groups = rewards.reshape(-1, num_generations)
    centred = _without_rounding(groups - _mean(groups), groups)
    if scale == "group":
        centred = centred / (_std(groups) + 1e-4)
    elif scale == "batch":
        centred = centred / (_std(rewards[None]) + 1e-4)
    return np.nan_to_num(centred.reshape(-1), nan=0.0)


def leave_one_out(rewards: np.ndarray, num_generations: int) -> np.ndarray:
    """r_i - mean of the other rewards of its group, float64 (N,) (RLOO, arXiv 2402.14740).

    NaN rewards count nowhere and give 0, as does a reward without others.
    """
    groups = rewards.reshape(-1, num_generations)
    others = (~np.isnan(groups)).sum(axis=1, keepdims=True) - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        baseline = (np.nansum(groups, axis=1, keepdims=True) - groups) / others
    return np.nan_to_num(_without_rounding(groups - baseline, groups).reshape(-1), nan=0.0)


def returns_to_go(rewards: np.ndarray, offsets: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma G_t+1 within each sample, float64 (T,): the advantage of REINFORCE (arXiv 2501.03262,
    eq. 8, where r is -beta KL_t at each token and the sample's reward at its last).

    Args:
        rewards: float64 (T,).
        offsets: int64 (N + 1,).
    """
    return gae(rewards, np.zeros_like(rewards), offsets, gamma, 1.0)[0]


def _mean(groups: np.ndarray) -> np.ndarray:
    """(G, 1), NaN for a group without rewards."""
    counts = (~np.isnan(groups)).sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.nansum(groups, axis=1, keepdims=True) / counts


def _std(groups: np.ndarray) -> np.ndarray:
    """(G, 1): unbiased, NaN for a group with fewer than two rewards."""
    counts = (~np.isnan(groups)).sum(axis=1, keepdims=True)
    squares = np.nansum((groups - _mean(groups)) ** 2, axis=1, keepdims=True)
    return np.sqrt(squares / np.where(counts > 1, counts - 1, np.nan))


def _without_rounding(differences: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Differences of values from their mean, exactly 0 where they are its rounding: an optimizer such as Adam
    makes steps of the usual size out of gradients of any size, so also out of these."""
    largest = np.abs(np.nan_to_num(values)).max(axis=-1, keepdims=True, initial=0.0)
    return np.where(np.abs(differences) <= MEAN_ROUNDING * largest, 0.0, differences)


def _of_gae(spec: AdvantageSpec, scored: Scored) -> Advantages:
    if scored.values is None:
        raise ValueError("gae needs the critic's values")
    counted, known = scored.counted(), scored.by_token(~np.isnan(scored.rewards))
    rewards = whiten(scored.at_tokens(scored.rewards), spec.whiten_rewards, counted)
    advantages, returns = gae(rewards, scored.values, scored.offsets, spec.gamma, spec.lam)
    whitened = whiten(np.where(known, advantages, 0.0), spec.whiten_advantages, counted)
    return Advantages(whitened, np.where(known, returns, scored.values))


def _of_group(spec: AdvantageSpec, scored: Scored) -> Advantages:
    of_samples = group_relative(scored.totals(), spec.num_generations, spec.scale_rewards)
    return _of_samples(spec, scored, of_samples)


def _of_rloo(spec: AdvantageSpec, scored: Scored) -> Advantages:
    return _of_samples(spec, scored, leave_one_out(scored.totals(), spec.num_generations))


def _of_reinforce(spec: AdvantageSpec, scored: Scored) -> Advantages:
    known = scored.by_token(~np.isnan(scored.rewards))
    of_samples = scored.rewards
    if spec.baseline == "group":
        groups = of_samples.reshape(-1, spec.num_generations)
        of_samples = _without_rounding(groups - _mean(groups), groups).reshape(-1)
    rewards = scored.at_tokens(of_samples)
    returns = np.where(known, returns_to_go(rewards, scored.offsets, spec.gamma), 0.0)
    return Advantages(whiten(returns, spec.whiten_advantages, scored.counted()))


def _of_samples(spec: AdvantageSpec, scored: Scored, advantages: np.ndarray) -> Advantages:
    """One advantage for all tokens of a sample; whitened over samples, whatever their lengths."""
    counted = scored.by_sample(scored.counted()) > 0
    return Advantages(scored.by_token(whiten(advantages, spec.whiten_advantages, counted)))


ADVANTAGES |= {
    "gae": _of_gae,
    "group": _of_group,
    "rloo": _of_rloo,
    "reinforce": _of_reinforce,
}


def advantages_of(spec: AdvantageSpec, scored: Scored) -> Advantages:
    """Advantages of every token by `spec.kind`, whitened as `spec` says; returns are not whitened."""
    return ADVANTAGES[spec.kind](spec, scored)


def whiten(values: np.ndarray, kind: Whitening, mask: np.ndarray | None = None) -> np.ndarray:
    """float64 (T,): whitened by the moments of the masked tokens.

    Args:
        values: float64 (T,).
        kind: `shift_and_scale`: (x - mean) / std. `scale`: (x - mean) / std + mean, which keeps the mean
            (TRL's `shift_mean=False`). `none`: as they are.
        mask: bool (T,): tokens that count; None: all. The others are left as they are.
    """
    counted = np.ones(len(values), bool) if mask is None else mask
    if kind == "none" or not counted.any():
        return values
    part = values[counted]
    mean, variance = part.mean(), part.var(ddof=1) if len(part) > 1 else 0.0
    whitened = _without_rounding(part - mean, part) / np.sqrt(variance + 1e-8)
    out = values.astype(np.float64, copy=True)
    out[counted] = whitened + mean if kind == "scale" else whitened
    return out

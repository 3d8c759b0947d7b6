"""Weighted sums of rewards, what is taken off them, and their metrics.

A sample that every source passes over has the reward NaN: it is outside every baseline, advantage 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

EQUAL = 1e-8
"""Standard deviation up to which rewards of a prompt count as equal (numpy's `isclose`, as in TRL)."""
RELATIVE_ROUNDING = 1e-12
"""As `EQUAL`, as a share of the largest reward: equal rewards of 1e9 differ from their own mean by 1e-7."""


def combine(rewards: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Weighted sum over sources, float64 (N,), as TRL's `sum_then_normalize`.

    Args:
        rewards: float64 (sources, N), NaN where a source passed a sample over: left out of the sum.
        weights: of the sources; one of weight 0 is only watched, and scores no sample for the sum.

    Returns:
        NaN where every source that has a weight passed the sample over.
    """
    factors = np.asarray(weights, dtype=np.float64)
    counted = rewards[factors != 0]
    total = np.nansum(counted * factors[factors != 0][:, None], axis=0)
    total[np.isnan(counted).all(axis=0)] = np.nan
    return total


def without_eos_penalty(rewards: np.ndarray, finished: np.ndarray, penalty: float | None) -> np.ndarray:
    """Take `penalty` off every sample that ended at the token limit (`missing_eos_penalty`, as TRL's PPO)."""
    return rewards if penalty is None else np.where(finished, rewards, rewards - penalty)


def soft_overlong_punishment(lengths: np.ndarray, limit: int, cache: int) -> np.ndarray:
    """Penalty of long samples, float64 (N,), from 0 to -1 (DAPO, arXiv 2503.14476, eq. 13).

    0 up to limit - cache tokens, then falling linearly to -1 at the limit, and -1 beyond it.

    Args:
        lengths: (N,), tokens of each completion.
        limit: `max_completion_length`.
        cache: tokens below the limit in which the punishment grows; at least 1.
    """
    beyond = np.asarray(lengths, dtype=np.float64) - (limit - cache)
    return -np.clip(beyond / cache, 0.0, 1.0)


def without_spread(rewards: np.ndarray, num_generations: int) -> np.ndarray:
    """bool (groups,): groups whose scored samples all have the same reward, or that have none: nothing in
    them can be compared.

    Args:
        rewards: float64 (N,), NaN where nobody scored; N in groups of `num_generations`.
    """
    groups = rewards.reshape(-1, num_generations)
    return np.array([_is_rounding(group, _moments(group).get("std", 0.0)) for group in groups])


def reward_metrics(
    names: Sequence[str],
    rewards: np.ndarray,
    weights: Sequence[float],
    num_generations: int,
    total: np.ndarray | None = None,
) -> dict[str, float]:
    """TRL's reward metrics: means and unbiased standard deviations over scored samples.

    Args:
        rewards: float64 (sources, N), NaN where passed over; N in groups of `num_generations`.
        weights: of the sources.
        total: float64 (N,): what advantages are made of, penalties included; NaN where nobody scored. None:
            the weighted sum is.

    Returns:
        `reward`, `reward_std`, `frac_reward_zero_std` (groups in which all rewards are equal: nothing to
        learn from), and `rewards/NAME/mean|std`. What has no scored sample is left out.
    """
    total = combine(rewards, weights) if total is None else total
    metrics = {f"rewards/{n}/{key}": v for n, row in zip(names, rewards) for key, v in _moments(row).items()}
    metrics |= {{"mean": "reward", "std": "reward_std"}[key]: value for key, value in _moments(total).items()}
    groups = total.reshape(-1, num_generations)
    zero = [_is_rounding(group, _moments(group).get("std", math.nan)) for group in groups]
    metrics["frac_reward_zero_std"] = float(np.mean(zero))
    return metrics


def _is_rounding(values: np.ndarray, std: float) -> bool:
    """True where a standard deviation of these values is no more than their rounding; False for NaN."""
    largest = np.nanmax(np.abs(values), initial=0.0)
    return bool(std <= EQUAL + RELATIVE_ROUNDING * largest)


def _moments(values: np.ndarray) -> dict[str, float]:
    scored = values[~np.isnan(values)]
    found = {"mean": float(scored.mean())} if len(scored) else {}
    return found | ({"std": float(scored.std(ddof=1))} if len(scored) > 1 else {})

"""Means of scores with their 95 % intervals. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def mean_with_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high end: Wilson's interval where all scores are in [0, 1], else the normal one. Of no
    scores 0 and all of [0, 1]."""
    total = float(sum(scores))
    shares = all(0 <= score <= 1 for score in scores)
    low, high = wilson(total, len(scores)) if shares else mean_interval(scores)
    return total / max(1, len(scores)), low, high


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927), bounds in [0, 1]."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Normal 95 % interval of a mean, for scores that are not shares."""
    array = np.asarray(values, dtype=float)
    half = 1.96 * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    return float(array.mean() - half), float(array.mean() + half)

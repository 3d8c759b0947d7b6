"""KL divergence from samples (Schulman 2020, joschu.net/blog/kl-approx.html), and the adaptive coefficient.

Of log-ratios d = log p - log q at tokens sampled from p; p is the policy, q the reference:
k1 = d; k2 = d^2 / 2; k3 = e^-d - 1 + d. As values all three estimate KL(p || q): k1 without bias and
noisy, k3 without bias and never negative, k2 with a small bias. As terms of a loss their gradients
differ: k1's has mean zero (it pulls to nothing), k2's is that of KL(p || q), k3's is that of KL(q || p).
Multiplied by the ratio of p to the policy that the tokens were sampled from, k1 and k3 have the gradient of
KL(p || q).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np

from actors.spec import KeyOf

Values = Any
"""A tensor, with gradient in a loss; or an array, in a driver, which has not imported torch."""


def k1(d: Values) -> Values:
    """d."""
    return d


def k2(d: Values) -> Values:
    """d^2 / 2."""
    return d * d / 2


def k3(d: Values) -> Values:
    """e^-d - 1 + d."""
    return (np.expm1(-d) if isinstance(d, np.ndarray) else (-d).expm1()) + d


KL_ESTIMATORS: dict[str, Callable[[Values], Values]] = {"k1": k1, "k2": k2, "k3": k3}
KlEstimator = Annotated[str, KeyOf(KL_ESTIMATORS)]


def kl_values(estimator: KlEstimator, logps: np.ndarray, ref_logps: np.ndarray) -> np.ndarray:
    """float64 (T,): the estimate at each token, in nats."""
    return KL_ESTIMATORS[estimator](np.asarray(logps, np.float64) - np.asarray(ref_logps, np.float64))


@dataclass(frozen=True)
class KlController:
    """The KL coefficient beta, fixed or moved towards a target (Ziegler et al. 2019, arXiv 1909.08593)."""

    beta: float
    target: float | None = None
    """KL per completion in nats (summed over its tokens) to be held; None: beta stays."""
    horizon: int = 10_000
    """Completions over which the largest error, 0.2, changes beta by 20 %."""

    def updated(self, kl: float, n: int) -> KlController:
        """After `n` completions with mean KL `kl`.

        e = clip(kl / target - 1, -0.2, 0.2); beta becomes beta (1 + e n / horizon).
        """
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, beta=self.beta * (1 + error * n / self.horizon))

"""Losses over (chosen, rejected) pairs, as pure tensor functions.

Each takes a `Pairs` and a `PairSettings` and returns one value per pair, as TRL 1.16 computes it
(`DPOTrainer._compute_loss`); `cdpo` is added. With c and r the log-ratios of chosen and rejected
to the reference, and d = c - r: rewards are beta c and beta r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class PairSettings(Protocol):
    """The numbers that pair losses read."""

    @property
    def beta(self) -> float: ...

    @property
    def label_smoothing(self) -> float: ...

    @property
    def discopop_tau(self) -> float: ...


@dataclass(frozen=True)
class Pairs:
    """Sums over completion tokens, one value per pair: every tensor is (R,)."""

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    chosen_scores: Tensor
    """f'(ratio) of the f-divergence; equal to the log-ratio for the reverse KL."""
    rejected_scores: Tensor

    @property
    def c(self) -> Tensor:
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def r(self) -> Tensor:
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def d(self) -> Tensor:
        return self.chosen_scores - self.rejected_scores

    @property
    def normalised_d(self) -> Tensor:
        """Difference of per-token mean scores."""
        return self.chosen_scores / self.chosen_lengths.clamp(
            min=1
        ) - self.rejected_scores / self.rejected_lengths.clamp(min=1)


def scores(logratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(t) for log t = `logratios` (f-DPO, arXiv 2309.16240, table 1), up to a constant.

    Raises:
        ValueError: for an unknown divergence.
    """
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return logratios
    if divergence == "forward_kl":
        return 1 - torch.exp(-logratios)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "alpha_divergence":
        # exp(80) leaves room for a product in float32; TRL clamps at the same value.
        return (torch.exp(((alpha - 1) * logratios).clamp(max=80.0)) - 1) / (alpha - 1)
    raise ValueError(f"unknown f-divergence: {divergence}")


def sigmoid(p: Pairs, s: PairSettings) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(s.beta * p.d)


def cdpo(p: Pairs, s: PairSettings) -> Tensor:
    """Conservative DPO: a share eps of the labels is taken to be flipped (Mitchell 2023)."""
    return _smoothed(s.beta * p.d, s.label_smoothing)


def robust(p: Pairs, s: PairSettings) -> Tensor:
    """Robust DPO: unbiased under label flips of rate eps (arXiv 2403.00409)."""
    x, eps = s.beta * p.d, s.label_smoothing
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)


def hinge(p: Pairs, s: PairSettings) -> Tensor:
    """SLiC's hinge on the normalised likelihood (arXiv 2305.10425)."""
    return torch.relu(1 - s.beta * p.d)


def ipo(p: Pairs, s: PairSettings) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) on per-token means, as its authors' results were obtained."""
    return (p.normalised_d - 1 / (2 * s.beta)) ** 2


def exo_pair(p: Pairs, s: PairSettings) -> Tensor:
    """EXO-pref (arXiv 2402.00856, eq. 16): KL(softmax of rewards || [1 - eps, eps])."""
    x, eps = s.beta * p.d, s.label_smoothing
    win = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-eps))
    lose = torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(eps))
    return win + lose


def nca_pair(p: Pairs, s: PairSettings) -> Tensor:
    """NCA for pairs (arXiv 2402.05369)."""
    c, r = s.beta * p.c, s.beta * p.r
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco_pair(p: Pairs, s: PairSettings) -> Tensor:
    """Binary classifier optimisation (arXiv 2404.04656), without the running reward shift."""
    return -F.logsigmoid(s.beta * p.c) - F.logsigmoid(-s.beta * p.r)


def sppo_hard(p: Pairs, s: PairSettings) -> Tensor:
    """SPPO (arXiv 2405.00675, eq. 4.7) with a win probability of 1."""
    return (p.c - 0.5 / s.beta) ** 2 + (p.r + 0.5 / s.beta) ** 2


def aot(p: Pairs, s: PairSettings) -> Tensor:
    """AOT, paired (arXiv 2406.05882): margins of policy and reference, each sorted over the batch."""
    policy = torch.sort(p.chosen_logps - p.rejected_logps).values
    reference = torch.sort(p.ref_chosen_logps - p.ref_rejected_logps).values
    return _smoothed(s.beta * (policy - reference), s.label_smoothing)


def aot_unpaired(p: Pairs, s: PairSettings) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): log-ratios of chosen and of rejected, each sorted."""
    return _smoothed(s.beta * (torch.sort(p.c).values - torch.sort(p.r).values), s.label_smoothing)


def apo_zero(p: Pairs, s: PairSettings) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7)."""
    return 1 - torch.sigmoid(s.beta * p.c) + torch.sigmoid(s.beta * p.r)


def apo_down(p: Pairs, s: PairSettings) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8)."""
    return torch.sigmoid(s.beta * p.c) + 1 - torch.sigmoid(s.beta * (p.c - p.r))


def discopop(p: Pairs, s: PairSettings) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5)."""
    x = s.beta * p.d
    mix = torch.sigmoid(x / s.discopop_tau)
    return -F.logsigmoid(x) * (1 - mix) + torch.exp(-x) * mix


def sigmoid_norm(p: Pairs, s: PairSettings) -> Tensor:
    """DPO on per-token mean scores (length-normalised, arXiv 2411.15124)."""
    return -F.logsigmoid(s.beta * p.normalised_d)


def _smoothed(x: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


PAIR_LOSSES: dict[str, Callable[[Pairs, PairSettings], Tensor]] = {
    f.__name__: f
    for f in (
        sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired,
        apo_zero, apo_down, discopop, sigmoid_norm, cdpo,
    )
}  # fmt: skip

"""Correction of samples of another policy: an older version, or the same one in an engine's numerics.

With w = pi_trainer / pi_engine at the sampled tokens (of a token, or the product over a sample), each token's
surrogate is multiplied by w, bounded by a mode (names and meaning are TRL's `vllm_importance_sampling_mode`):

- token_truncate: clip(w_t, clip_min, clip_max): truncated importance sampling
- token_mask: w_t within [clip_min, clip_max], else 0 (IcePop, arXiv 2510.18855: both bounds, .5 and 5)
- sequence_truncate, sequence_mask: the same with the sample's w

The divergence's term of a loss is not multiplied, as in TRL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from actors.spec import Spec

CORRECTION = "importance_sampling_ratio"
"""Token column of a batch that holds the bounded ratios, where there is a correction."""
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True)
class Correction:
    """Bounds of importance ratios."""

    mode: CorrectionMode
    clip_max: float | None
    clip_min: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest ratio that is left as it is."""
        low = -np.inf if self.clip_min is None else self.clip_min
        return low, np.inf if self.clip_max is None else self.clip_max


class CorrectionSettings(Spec):
    """Settings of the correction, by TRL's names."""

    vllm_importance_sampling_mode: CorrectionMode = "sequence_mask"
    """Bounding of that ratio: `token_truncate` and `sequence_truncate` clip it, `token_mask` (IcePop) and
    `sequence_mask` make it 0 outside the bounds; of each token, or of the whole sample."""
    vllm_importance_sampling_clip_max: float | None = Field(default=3.0, gt=0, allow_inf_nan=False)
    """Its upper bound; null: none."""
    vllm_importance_sampling_clip_min: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Its lower bound; null: none."""

    def correction(self) -> Correction:
        """Bounds of importance ratios."""
        return Correction(
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_max,
            self.vllm_importance_sampling_clip_min,
        )


@dataclass(frozen=True)
class Corrected:
    """Weights of samples."""

    ratio: np.ndarray
    """float64 (T,): what each token's surrogate is multiplied by."""
    metrics: dict[str, float]


def importance_ratios(
    logps: np.ndarray, engine_logps: np.ndarray, offsets: np.ndarray, mask: np.ndarray, how: Correction
) -> Corrected:
    """Bounded importance ratios of samples.

    Args:
        logps, engine_logps: float64 (T,), log-probabilities of the sampled tokens by the policy that trains
            and by the one that they come from.
        offsets: int64 (samples + 1,): tokens of each sample.
        mask: bool (T,): tokens that count; the others have a ratio of 1 (and add nothing to their sample's).

    Returns:
        the ratios; TRL's metrics, means over counted tokens (of samples where the mode is by sample), and
        `sampling/masked`: the share of counted tokens with a ratio of 0.
    """
    difference = np.where(mask, logps - engine_logps, 0.0)
    by_sample = how.mode.startswith("sequence")
    if by_sample:
        sample = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        difference = np.bincount(sample, weights=difference, minlength=len(offsets) - 1)
    low, high = how.bounds
    raw = np.exp(difference)
    if how.mode.endswith("truncate"):
        bounded = raw.clip(low, high)
    else:
        bounded = np.where((raw < low) | (raw > high), 0.0, raw)
    ratio = bounded[sample] if by_sample else bounded
    looked_at = bounded if by_sample else bounded[mask]
    return Corrected(ratio, _metrics(looked_at, np.abs(logps - engine_logps)[mask], ratio[mask]))


def _metrics(bounded: np.ndarray, difference: np.ndarray, ratio: np.ndarray) -> dict[str, float]:
    apart, weights = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    return {
        f"{apart}/mean": float(difference.mean()) if len(difference) else 0.0,
        f"{apart}/max": float(difference.max(initial=0.0)),
        f"{weights}/min": float(bounded.min()) if len(bounded) else 0.0,
        f"{weights}/mean": float(bounded.mean()) if len(bounded) else 0.0,
        f"{weights}/max": float(bounded.max()) if len(bounded) else 0.0,
        "sampling/masked": float((ratio == 0).mean()) if len(ratio) else 0.0,
    }

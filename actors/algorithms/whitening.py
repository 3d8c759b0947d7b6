"""Whitening of token values, named by kind.

The variance is the unbiased one (N - 1), over the tokens that count; 1e-8 is added to it, as in TRL's PPO.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Whitening = Literal["none", "shift_and_scale", "scale"]


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
    whitened = (part - mean) / np.sqrt(variance + 1e-8)
    out = values.astype(np.float64, copy=True)
    out[counted] = whitened + mean if kind == "scale" else whitened
    return out

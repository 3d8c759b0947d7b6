"""Numbers on a grid, so that every sum of them is exact: the same bits in any order, on every device."""

from __future__ import annotations

import torch

EXPONENT_BITS = 0x7F800000
"""Of a float32: with the rest cleared, the largest power of two that is not above it."""
MANTISSA = 53
"""Bits of a float64: sums of numbers on a grid are exact as long as they fit."""


def on_grid(values: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """float64: float32 values, rounded to multiples of 2^(e + 1 - bits), where 2^e <= the largest along `dim`
    < 2^(e + 1)."""
    largest = values.abs().amax(dim, keepdim=True)
    power = (largest.view(torch.int32) & EXPONENT_BITS).view(torch.float32).double()
    # The last bit of this number is worth one step of the grid, and so is that of its sum with a value.
    rounder = power.mul_(1.5 * 2.0 ** (MANTISSA - bits))
    return values.double().add_(rounder).sub_(rounder)


def exact_mean(values: torch.Tensor) -> torch.Tensor:
    """float32 (N,): the mean of each row of float32 (N, n), rounded at the end only.

    torch's own mean has other bits for another number of threads, and on another device.
    """
    bits = MANTISSA - (values.shape[1] - 1).bit_length()
    return on_grid(values, 1, bits).sum(1).div_(values.shape[1]).float()

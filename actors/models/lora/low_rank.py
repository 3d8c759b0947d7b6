"""A low-rank update of one weight: its factors, and their product. Needs torch only."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factors:
    """The low-rank update of one weight, or of one stack of experts."""

    a: torch.Tensor
    """float32 ([experts,] r, in), contiguous."""
    b: torch.Tensor
    """float32 ([experts,] out, r), contiguous."""
    scaling: float
    transposed: bool
    """The weight is stored as ([experts,] in, out)."""


def low_rank_delta(factors: Factors) -> torch.Tensor:
    """s B A in float32, of the weight's shape. Trainer, engine and written checkpoint have the same bits
    because all of them compute the product here."""
    # In place: a product of this size costs less than the memory for a second one.
    delta = (factors.b @ factors.a).mul_(factors.scaling)
    return delta.transpose(1, 2) if factors.transposed else delta

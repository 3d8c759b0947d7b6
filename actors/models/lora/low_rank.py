"""A low-rank update of one weight: its factors, and their product. Needs torch only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from actors.models.exact_sums import MANTISSA, on_grid

BLOCK = {"cpu": 2**17}
"""Elements of a product that are computed at once: 1 MiB in float64, which a core's cache holds."""
LARGE_BLOCK = 2**24
"""The same on other devices."""


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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, as it is stored."""
        *experts, out, _ = self.b.shape
        into = self.a.shape[-1]
        return (*experts, into, out) if self.transposed else (*experts, out, into)

    def scaled(self, dtype: torch.dtype) -> Factors:
        """A and s B, each rounded once to `dtype`: a scaling of 1 is left."""
        return Factors(self.a.to(dtype), (self.b * self.scaling).to(dtype), 1.0, self.transposed)


def low_rank_delta(factors: Factors) -> torch.Tensor:
    """s B A in float32, of the weight's shape: the same bits on every device, in any order of summation.

    Trainer, engine and written checkpoint compute it here, on CPUs and GPUs, with threads and in shares of
    their own, and digests of the sums are compared. A float32 product depends on the order in which a library
    adds (all tensors of an expert's size differ somewhere between two orders); so the terms are made such
    that every sum of them is exact. The columns of A and the rows of B, along r, are rounded to whole
    multiples of a power of two, to at most 24 bits each; a product then has 48, and the sum of r of them fits
    into float64's 53 (Ozaki et al. 2012, "Error-free transformations of matrix multiplication"). What is left
    are operations on single elements, which IEEE 754 defines to the bit. The error is that of a float32
    product: seen 1e-7 of the largest element, 2e-7 with torch's.
    """
    product = ExactProduct(factors)
    a, b = product.a, product.b
    delta = torch.empty((*b.shape[:-1], a.shape[-1]), dtype=torch.float32, device=a.device)
    parts = zip(a, b, delta) if a.ndim == 3 else [(a, b, delta)]
    rows = product.rows_at_once
    if a.ndim == 3 and rows >= 2 * b.shape[1]:
        # Many small experts: several at once.
        several = rows // b.shape[1]
        parts = zip(a.split(several), b.split(several), delta.split(several))
    for one_a, one_b, one_delta in parts:
        for lines, target in zip(one_b.split(rows, dim=-2), one_delta.split(rows, dim=-2)):
            product.write(lines, one_a, target)
    return delta.transpose(1, 2) if factors.transposed else delta


class ExactProduct:
    """s B A of one weight, of which parts can be asked for: see `low_rank_delta`."""

    def __init__(self, factors: Factors) -> None:
        bits = _bits(factors.a.shape[-2])
        self.a, self.b = on_grid(factors.a, -2, bits), on_grid(factors.b, -1, bits)
        self._scaling: float | None = factors.scaling
        if abs(math.frexp(factors.scaling)[0]) == 0.5:
            # A power of two changes no bit of a mantissa: alpha / r is one as a rule, and B is small.
            self.b.mul_(factors.scaling)
            self._scaling = None
        self.rows_at_once = max(1, BLOCK.get(self.a.device.type, LARGE_BLOCK) // self.a.shape[-1])

    def added_to(self, base: torch.Tensor, expert: int | None, rows: slice) -> torch.Tensor:
        """float32 (rows, in): `base`, those rows of the weight or of one expert, and their s B A.

        Product and sum are taken a block at a time, which stays in the cache.
        """
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        result = torch.empty(base.shape, dtype=torch.float32, device=base.device)
        step = self.rows_at_once
        for lines, target, values in zip(b[rows].split(step), result.split(step), base.split(step)):
            self.write(lines, a, target)
            target.add_(values)
        return result

    def write(self, lines: torch.Tensor, a: torch.Tensor, target: torch.Tensor) -> None:
        """s times rows of B and A, both on the grid, into float32."""
        product = lines @ a
        # In its own dtype: into another one torch multiplies at half the speed, to the same bits.
        target.copy_(product if self._scaling is None else product.mul_(self._scaling))


def _bits(rank: int) -> int:
    """Of a factor, so that the sum of `rank` products of two fits into a float64."""
    return min(24, (MANTISSA - (rank - 1).bit_length()) // 2)

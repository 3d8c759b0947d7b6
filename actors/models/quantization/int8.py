"""int8 by rows: each row is whole numbers from -127 to 127, times its largest absolute value / 127.

The numbers are those of bitsandbytes (0.50, `int8_vectorwise_quant` and `int8_vectorwise_dequant`), which has
no stacks of matrices. Dettmers et al. 2022, "LLM.int8()" (its outliers are a matter of activations, which
stay in 16 or 32 bits here).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.models.spec import Quantization

LARGEST = 127.0
INVERSE = 7.874015718698502e-3
"""1 / 127, as bitsandbytes writes it."""
TINY = 1e-30
"""In place of the largest value of a row of zeros: 127 / TINY is still a float32."""


class Int8:
    """Row-wise absmax. Parts: int8 (N, rows, columns), float32 (N, rows)."""

    kind: Quantization = "int8"

    def quantised(self, matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Codec`."""
        largest = matrices.abs().amax(-1)
        # In this order, as bitsandbytes has it: a quotient of both would have other last bits.
        factor = largest.clamp(min=TINY).reciprocal_().mul_(LARGEST)
        return (matrices * factor[..., None]).round_().to(torch.int8), largest

    def dequantised(
        self, parts: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """See `Codec`."""
        codes, largest = parts
        return codes.float().mul_(largest[..., None]).mul_(INVERSE).to(dtype)

    def takes(self, shape: tuple[int, int]) -> bool:
        """See `Codec`."""
        return True

    def nbytes(self, shape: tuple[int, int]) -> int:
        """See `Codec`."""
        rows, columns = shape
        return rows * columns + 4 * rows

"""The interface of a codec: matrices in float32 to a few small tensors, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from actors.models.spec import Quantization

AT_ONCE = 2**24
"""Elements that are quantised or dequantised at once: what is held for it beside a large stack of experts
stays small."""


class Codec(Protocol):
    """Quantises matrices one by one, so that a matrix has the same bits in any stack, on every device and
    with any number of threads."""

    kind: Quantization

    def quantised(self, matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Parts of float32 (N, rows, columns): each begins with the dimension N."""

    def dequantised(
        self, parts: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """(N, rows, columns) of the parts of N matrices of `shape`: in float32, rounded once to `dtype`."""

    def takes(self, shape: tuple[int, int]) -> bool:
        """True where matrices of this shape can be quantised."""

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the parts of a matrix."""


def codec_of(kind: Quantization) -> Codec:
    """The codec of a value of `model.quantization`."""
    if kind == "int8":
        from actors.models.quantization.int8 import Int8

        return Int8()
    from actors.models.quantization.nf4 import Nf4

    return Nf4()


def quantise(codec: Codec, matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`codec.quantised`, some matrices at a time. `matrices`: (N, rows, columns), of any floating dtype."""
    parts = [codec.quantised(some.float()) for some in matrices.split(_several(matrices.shape[1:]))]
    return tuple(torch.cat(of_each) if len(of_each) > 1 else of_each[0] for of_each in zip(*parts))


def dequantise(
    codec: Codec, parts: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """`codec.dequantised`, some matrices at a time."""
    n, several = len(parts[0]), _several(shape)
    if n <= several:
        return codec.dequantised(parts, shape, dtype)
    made = torch.empty((n, *shape), dtype=dtype, device=parts[0].device)
    for first in range(0, n, several):
        some = slice(first, first + several)
        made[some] = codec.dequantised([part[some] for part in parts], shape, dtype)
    return made


def rounded(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    """float32, of the same shape: a matrix, or a stack of matrices, as it is after quantising and back."""
    matrices = tensor.reshape(-1, *tensor.shape[-2:])
    shape = (matrices.shape[1], matrices.shape[2])
    return dequantise(codec, quantise(codec, matrices), shape, torch.float32).view(tensor.shape)


def _several(shape: Sequence[int]) -> int:
    rows, columns = shape
    return max(1, AT_ONCE // (rows * columns))

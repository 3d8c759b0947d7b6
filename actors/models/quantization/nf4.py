"""NF4 with double quantisation: 4 bits a weight, in blocks of 64 with a scale of 8 bits each.

Codes and layout are those of bitsandbytes (0.50: `quantize_4bit` with `compress_statistics`), in operations
of torch that are defined to the bit for single elements, so that CPUs and GPUs agree; bitsandbytes has no
stacks of matrices. One thing is computed otherwise: the mean of a matrix's scales, which bitsandbytes takes
by `torch.mean`, whose last bit depends on threads and device. Here it is exact, and rounded once.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from actors.models.exact_sums import exact_mean
from actors.models.spec import Quantization

BLOCK = 64
"""Weights with one scale."""
SCALES = 256
"""Scales with one scale of their own."""
STEPS = 65536
"""From -1 to 1, in which a scale is looked up."""
AT_ONCE = {"cpu": 2**12}
"""Blocks that are quantised at once, by device (others: all): 1 MiB, which a core's cache holds."""
SMALLEST = 1e-38
"""In place of the scale of zeros, whose inverse would be infinite."""

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, with zero among them (QLoRA, appendix E)."""


class Nf4:
    """Parts: uint8 (N, rows x columns / 2), the first of two weights in the high bits; uint8 (N, blocks), the
    scale of each; float32 (N, blocks / 256 upwards), the scale of these; float32 (N,), their mean."""

    kind: Quantization = "nf4"

    def quantised(self, matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Codec`."""
        blocks, levels = matrices.reshape(-1, BLOCK), _levels(matrices.device)
        codes = blocks.new_empty((len(blocks), BLOCK // 2), dtype=torch.uint8)
        scale = blocks.new_empty(len(blocks))
        step = AT_ONCE.get(matrices.device.type, len(blocks))
        for some, of_codes, of_scale in zip(blocks.split(step), codes.split(step), scale.split(step)):
            torch.amax(some.abs(), -1, out=of_scale)
            inverse = of_scale.clamp(min=SMALLEST).reciprocal_()
            nearest = _nearest((some * inverse[:, None]).clamp_(-1, 1), levels)
            torch.bitwise_or(nearest[:, ::2] << 4, nearest[:, 1::2], out=of_codes)
        scale = scale.view(len(matrices), -1)
        mean = exact_mean(scale)
        return (codes.view(len(matrices), -1), *_scales_quantised(scale - mean[:, None]), mean)

    def dequantised(
        self, parts: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """See `Codec`."""
        codes, scale, of_scale, mean = parts
        scale = _scales_dequantised(scale, of_scale).add_(mean[:, None])
        # Two weights by one index, as a byte holds them.
        values = _pairs(codes.device).index_select(0, codes.reshape(-1).int())
        blocks = values.view(len(codes), -1, BLOCK).mul_(scale[..., None])
        return blocks.view(len(codes), *shape).to(dtype)

    def takes(self, shape: tuple[int, int]) -> bool:
        """See `Codec`."""
        rows, columns = shape
        return rows * columns % BLOCK == 0

    def nbytes(self, shape: tuple[int, int]) -> int:
        """See `Codec`."""
        rows, columns = shape
        blocks = rows * columns // BLOCK
        return rows * columns // 2 + blocks + 4 * -(-blocks // SCALES) + 4


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """uint8: the number of the nearest level; halfway, the lower one."""
    if values.device.type == "cpu" and len(levels) == len(LEVELS):
        # A binary search takes 19 ns a value on one thread of a CPU, fifteen comparisons 8.
        found = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
        for bound in ((levels[:-1] + levels[1:]) / 2).tolist():
            found.add_(values > bound)
        return found
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


def _scales_quantised(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (N, blocks) and float32 (N, blocks / 256 upwards) of float32 (N, blocks).

    bitsandbytes' CPU code looks the nearest level up in a table of 65,536 steps, so that is done here.
    """
    n, blocks = scales.shape
    filled = torch.nn.functional.pad(scales, (0, -blocks % SCALES)).view(n, -1, SCALES)
    largest = filled.abs().amax(-1)
    inverse = largest.clamp(min=SMALLEST).reciprocal_()
    step = (filled * inverse[..., None]).clamp_(-1, 1).add_(1).mul_(0.5).mul_(STEPS - 1).add_(0.5)
    codes = _nearest_of_steps(scales.device).index_select(0, step.view(-1).int()).view(n, -1, SCALES)
    codes = codes * (largest > 0)[..., None]
    return codes.view(n, -1)[:, :blocks].contiguous(), largest


def _scales_dequantised(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    n, blocks = codes.shape
    values = dynamic_levels().to(codes.device).index_select(0, codes.reshape(-1).int()).view(n, blocks)
    return values.mul_(largest.repeat_interleave(SCALES, 1)[:, :blocks])


@functools.cache
def dynamic_levels() -> torch.Tensor:
    """float32 (256,): bitsandbytes' signed dynamic 8-bit numbers, on the CPU.

    Seven decades, each with twice as many numbers as the one below: the middles of equal parts of .1 to 1.
    Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 2.1.
    """
    found = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for decade in range(7):
        ends = _equal_parts(2**decade)
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (decade - 6)
        found += [middles, -middles]
    return torch.cat(found).sort().values


def _equal_parts(n: int) -> torch.Tensor:
    """The n + 1 ends of equal parts of .1 to 1, to the bits of a float32 `torch.linspace` with fused
    products: without such instructions it has others."""
    first, last = torch.tensor([0.1, 1.0], dtype=torch.float32, device="cpu")
    step, number = ((last - first) / n).double(), torch.arange(n + 1, dtype=torch.float64, device="cpu")
    from_first, from_last = first.double() + step * number, last.double() - step * (n - number)
    return torch.where(number < (n + 1) // 2, from_first, from_last).float()


@functools.cache
def _nearest_of_steps(device: torch.device) -> torch.Tensor:
    """uint8 (STEPS,): the dynamic level that is nearest to each step."""
    steps = torch.arange(STEPS, device="cpu").float().mul_(2).div_(STEPS - 1).sub_(1)
    return _nearest(steps, dynamic_levels()).to(device)


@functools.cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """float32 (256, 2): the two levels of each byte."""
    levels = _levels(device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1)

"""Codecs of quantised bases: bitsandbytes' numbers, and the same bits in any stack with any threads."""

from __future__ import annotations

from hashlib import blake2b

import pytest
import torch

from actors.models.exact_sums import exact_mean
from actors.models.quantization.codec import codec_of, dequantise, quantise, rounded
from actors.models.quantization.nf4 import LEVELS, SCALES, Nf4, dynamic_levels

SHAPE = (40, 448)
"""280 blocks: more than one scale of scales."""


def dyadic(shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    """Weights whose scales have a mean that float32 sums give exactly, whatever the order; and a block of
    zeros."""
    count = shape[0] * shape[1]
    number = torch.arange(count)
    weights = (number * 37 % 1009 - 504).float() / 4096 * 2.0 ** -(number // 64 % 5).float()
    weights[64:128] = 0
    return weights.view(shape)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def digest(tensor: torch.Tensor) -> str:
    return blake2b(tensor.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


OF_BITSANDBYTES = {
    "nf4": ("7179fa184bb95ad1", "15f456aedd56fad1", "8300d436e3d67666", "a6b540ee3f1a7609"),
    "int8": ("01b463bc21d6c2ce", "c78c0051c6a09277"),
}
"""Digests of the parts that bitsandbytes 0.50.2 makes of `dyadic()` on a CPU."""
DEQUANTISED = {"nf4": "4472b36f2d664e78", "int8": "b088a1b88f5cd9a5"}
"""The same of what it dequantises, in float32."""


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_parts_and_weights_are_those_recorded_from_bitsandbytes(kind):
    codec = codec_of(kind)
    parts = codec.quantised(dyadic()[None])
    assert tuple(map(digest, parts)) == OF_BITSANDBYTES[kind]
    assert digest(codec.dequantised(parts, SHAPE, torch.float32)) == DEQUANTISED[kind]


def test_levels_are_those_recorded_from_bitsandbytes():
    assert digest(dynamic_levels()) == "c01e8b70d775f98d"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nf4_is_that_of_an_installed_bitsandbytes(dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(bnb.create_dynamic_map(), dynamic_levels())
    assert bnb.get_4bit_type("nf4", "cpu").tolist() == list(LEVELS)
    for weights in (dyadic().to(dtype), random(64, 128, dtype=dtype), random(7, 192, dtype=dtype, seed=1)):
        codec, shape = Nf4(), (weights.shape[0], weights.shape[1])
        parts = codec.quantised(weights.float()[None])
        codes, scale, of_scale, mean = (part[0] for part in parts)
        theirs, state = bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
        assert torch.equal(theirs.flatten(), codes)
        # The last bit of their mean depends on the number of threads: everything else with ours for it.
        assert abs(state.offset - mean) <= 1e-7 * mean
        scales = weights.float().reshape(-1, 64).abs().amax(1) - mean
        their_scale, their_state = bnb.quantize_blockwise(scales, blocksize=SCALES)
        assert torch.equal(their_scale, scale)
        assert torch.equal(their_state.absmax, of_scale)
        state.offset, state.absmax, state.state2.absmax, state.dtype = mean, scale, of_scale, dtype
        ours = codec.dequantised(parts, shape, dtype)[0]
        assert torch.equal(bnb.dequantize_4bit(theirs, state).view(shape), ours)


def test_int8_is_that_of_an_installed_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    for weights in (dyadic()[1:], random(64, 128)):
        parts = codec_of("int8").quantised(weights[None])
        codes, rows, _ = bnb.int8_vectorwise_quant(weights)
        assert torch.equal(codes, parts[0][0])
        assert torch.equal(rows, parts[1][0])
        ours = codec_of("int8").dequantised(parts, tuple(weights.shape), torch.float32)[0]
        assert torch.equal(bnb.int8_vectorwise_dequant(codes, rows), ours)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_matrix_has_the_same_bits_alone_in_a_stack_and_with_other_threads(kind):
    codec, stack = codec_of(kind), random(3, 256, 640)
    threads = torch.get_num_threads()
    together = quantise(codec, stack)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        alone = [codec.quantised(matrix[None]) for matrix in stack]
    finally:
        torch.set_num_threads(threads)
    for number, parts in enumerate(alone):
        assert all(torch.equal(part[0], whole[number]) for part, whole in zip(parts, together, strict=True))


def test_large_stacks_are_taken_some_matrices_at_a_time(monkeypatch):
    codec, stack = codec_of("nf4"), random(5, 64, 64)
    parts = quantise(codec, stack)
    weights = dequantise(codec, parts, (64, 64), torch.bfloat16)
    monkeypatch.setattr("actors.models.quantization.codec.AT_ONCE", 2 * 64 * 64)
    again = quantise(codec, stack)
    assert all(map(torch.equal, parts, again))
    assert torch.equal(dequantise(codec, again, (64, 64), torch.bfloat16), weights)


def test_the_mean_of_scales_is_exact_in_any_order():
    scales = random(2, 100_000).abs()
    mean = exact_mean(scales)
    assert torch.equal(mean, scales.double().mean(1).float())
    shuffled = scales[:, torch.randperm(100_000, generator=torch.Generator().manual_seed(2))]
    assert torch.equal(exact_mean(shuffled), mean)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.52), ("int8", 1.01)])
def test_a_large_matrix_takes_little_more_than_its_codes(kind, most):
    parts = codec_of(kind).quantised(random(1, 768, 2048))
    assert sum(part.nbytes for part in parts) / (768 * 2048) < most


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.15), ("int8", 0.005)])
def test_what_comes_back_is_near_and_zeros_stay_zeros(kind, most):
    weights = random(2, 64, 256)
    weights[1] = 0
    back = rounded(codec_of(kind), weights)
    assert float((back[0] - weights[0]).abs().max()) < most * float(weights.abs().max())
    assert not back[1].any()


def test_codes_do_not_depend_on_torchs_default_dtype_or_device():
    codec, weights = codec_of("nf4"), random(1, 64, 128)
    expected = codec.quantised(weights)
    from actors.models.quantization import nf4

    for cached in (nf4.dynamic_levels, nf4._nearest_of_steps, nf4._levels, nf4._pairs):
        cached.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = codec.quantised(weights)
            back = codec.dequantised(found, (64, 128), torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(back, codec.dequantised(expected, (64, 128), torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_gpu_quantises_and_dequantises_to_the_bits_of_a_cpu(kind):
    codec, stack = codec_of(kind), random(4, 768, 2048)
    stack[1] *= 10 ** random(768, 2048, seed=1)
    here, there = quantise(codec, stack), quantise(codec, stack.cuda())
    assert all(torch.equal(one, other.cpu()) for one, other in zip(here, there, strict=True))
    for dtype in (torch.float32, torch.bfloat16):
        expected, found = (dequantise(codec, parts, (768, 2048), dtype) for parts in (here, there))
        assert torch.equal(expected, found.cpu())

"""Digests of tensors: what they see, and the same numbers from everybody who computes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from actors.errors import InvariantViolation
from actors.sync import digests
from actors.sync.digests import Algorithm, Digests, algorithm_for, digest_of, integer_sums, words_of
from tests.actors.pretend_device import There, second_device

BOTH: tuple[Algorithm, ...] = ("xxh3", "sums")
ALL = 2**64 - 1
TRITON = Path(sys.prefix) / "triton"
"""Where `make triton` puts it: beside the locked set, so that nothing else finds it."""
SIZES = (0, 1, 3, 5000)
"""Bytes of tensors: none, less than a word, and more than a block with something over."""


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_plain_python(data: bytes, first: int = 0) -> list[int]:
    """The sums by their definition, with integers of any size."""

    def mixed(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & ALL
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & ALL
        return value ^ (value >> 31)

    plain = weighted = 0
    for at in range(0, len(data), 8):
        key = mixed((first + at // 8 + 1) * 0x9E3779B97F4A7C15 & ALL)
        word = mixed(int.from_bytes(data[at : at + 8], "little") ^ key)
        plain, weighted = plain + word, weighted + word * (key | 1)
    return [plain & ALL, weighted & ALL]


def unsigned(sums: torch.Tensor) -> list[int]:
    return [value & ALL for value in sums.tolist()]


def data_of(size: int) -> torch.Tensor:
    return (drawn(size, seed=size) * 99).abs().to(torch.uint8)


# --- Both algorithms ------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", BOTH)
def test_a_digest_sees_shape_and_dtype_and_not_strides(algorithm: Algorithm) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    right = digest_of(tensor, algorithm)
    assert digest_of(tensor.T.contiguous().T, algorithm) == right
    assert digest_of(torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(2, 3), algorithm) == right
    assert digest_of(tensor.reshape(3, 2), algorithm) != right
    assert digest_of(torch.zeros(2), algorithm) != digest_of(torch.zeros(2, dtype=torch.int32), algorithm)
    assert digest_of(torch.zeros(0), algorithm) != digest_of(torch.zeros(0, 1), algorithm)
    assert len(right) == 32


@pytest.mark.parametrize("algorithm", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_every_flipped_bit_and_every_swap_of_two_elements_is_seen(
    algorithm: Algorithm, dtype: torch.dtype
) -> None:
    tensor = torch.arange(1, 22).to(dtype)
    seen = {digest_of(tensor, algorithm)}
    raw = tensor.view(torch.uint8)
    for byte in range(raw.numel()):
        for bit in range(8):
            changed = raw.clone()
            changed[byte] ^= 1 << bit
            seen.add(digest_of(changed.view(dtype), algorithm))
    for one in range(21):
        for other in range(one):
            swapped = tensor.clone()
            swapped[one], swapped[other] = tensor[other], tensor[one]
            seen.add(digest_of(swapped, algorithm))
    assert len(seen) == 1 + 8 * raw.numel() + 21 * 20 // 2


@pytest.mark.parametrize("algorithm", BOTH)
def test_tensors_that_are_taken_together_have_the_digests_that_they_have_alone(algorithm: Algorithm) -> None:
    tensors = {name: drawn(size) for name, size in (("b", 9), ("a", 40_000), ("c", 0))}
    together = Digests(algorithm)
    for name, tensor in tensors.items():
        together.take(name, tensor)
        tensor.zero_()
    tensors = {name: drawn(tensor.numel()) for name, tensor in tensors.items()}
    assert together.read() == {name: digest_of(tensors[name], algorithm) for name in "abc"}
    assert list(together.read()) == ["a", "b", "c"]


# --- Sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_of_plain_integers(size: int) -> None:
    data = data_of(size)
    assert unsigned(integer_sums(data)) == in_plain_python(bytes(data.tolist()))
    assert unsigned(integer_sums(data, first=77)) == in_plain_python(bytes(data.tolist()), 77)


@pytest.mark.parametrize("chunk", [1, 7, 1000, 2**20])
def test_no_split_changes_a_sum(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    words = words_of(drawn(5001))
    right = integer_sums(words)
    monkeypatch.setattr(digests, "CHUNK", chunk)
    assert torch.equal(integer_sums(words), right)
    parts = words.split(max(chunk, 100))
    firsts = range(0, len(words), max(chunk, 100))
    assert torch.equal(sum(map(integer_sums, parts, firsts), torch.zeros(2, dtype=torch.int64)), right)


def test_a_device_hands_over_sums_and_nothing_else() -> None:
    tensors = {str(seed): drawn(300, 7, seed=seed) for seed in range(5)}
    with second_device() as copied:
        taken = Digests("sums")
        for name, tensor in tensors.items():
            taken.take(name, There(tensor))
        assert not copied, "nothing waits for the device while tensors are taken"
        found = taken.read()
        assert copied == [16 * len(tensors)]
    assert found == {name: digest_of(tensor, "sums") for name, tensor in tensors.items()}


def test_a_tensor_elsewhere_is_not_fetched_for_the_algorithm_of_the_cpu() -> None:
    with second_device() as copied, pytest.raises(InvariantViolation, match="would have to be copied"):
        digest_of(There(torch.ones(3)), "xxh3")
    assert not copied


@pytest.mark.parametrize(
    ("devices", "algorithm"),
    [(["cpu", "cpu"], "xxh3"), (["cpu", "cuda"], "sums"), (["cuda", "cpu", "cpu"], "sums"), ([], "xxh3")],
)
def test_a_device_on_either_side_makes_it_sums(devices: list[str], algorithm: Algorithm) -> None:
    assert algorithm_for(devices) == algorithm


# --- The kernel -----------------------------------------------------------------------------------

INTERPRETED = """
import json, sys, torch
from actors.sync.digest_kernel import integer_sums
from actors.sync.digests import words_of
for size, first, data in json.load(sys.stdin):
    words = words_of(torch.tensor(data, dtype=torch.uint8))
    print(json.dumps(integer_sums(words, first).tolist()))
"""
COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from actors.sync.digest_kernel import BLOCK, ROUNDS, _add_up
kinds = {"words": "*i64", "found": "*i64", "size": "i64", "first": "i64", "BLOCK": "constexpr",
         "ROUNDS": "constexpr"}
source = ASTSource(_add_up, signature=kinds, constexprs={"BLOCK": BLOCK, "ROUNDS": ROUNDS})
print(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def with_triton(script: str, repository: Path, cache: Path, **env: str) -> list[str]:
    """Lines that a process with Triton prints; its own, as Triton's interpreter stays on once it is."""
    if find_spec("triton") is None and not (TRITON / "triton").is_dir():
        pytest.skip("needs Triton, which is not in the locked set (1 GB that vLLM has no use for on CPUs): "
                    "`make triton` puts it beside it")  # fmt: skip
    path = os.pathsep.join(filter(None, [str(repository), str(TRITON), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([[size, first, data_of(size).tolist()] for size in SIZES for first in (0, 77)]),
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_kernel_gives_the_same_sums_in_tritons_interpreter(repository: Path, tmp_path: Path) -> None:
    lines = with_triton(INTERPRETED, repository, tmp_path, TRITON_INTERPRET="1")
    found = [json.loads(line) for line in lines]
    assert found == [integer_sums(data_of(size), first).tolist() for size in SIZES for first in (0, 77)]


def test_the_kernel_compiles_for_a_card_that_is_not_here(repository: Path, tmp_path: Path) -> None:
    assert int(with_triton(COMPILED, repository, tmp_path)[0]) > 1000


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, 40_000_001])
def test_a_card_gives_the_same_sums_with_the_kernel_and_without(size: int) -> None:
    from actors.sync.digest_kernel import integer_sums as by_kernel

    here, there = data_of(size), data_of(size).cuda()
    right = integer_sums(here).tolist()
    assert by_kernel(words_of(there)).tolist() == integer_sums(there).tolist() == right
    assert digest_of(there, "sums") == digest_of(here, "sums")

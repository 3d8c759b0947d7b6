"""Digests of tensors: of shape, dtype and values, whatever the strides; 128 bits in hexadecimal.

They guard against faults, not against forgers. Both ends of a sync use one algorithm (`algorithm_for`), which
a payload's manifest names:

- `xxh3`: XXH3 of the bytes, in memory's order. The CPU's, at 19 GB/s on one core: every sync takes it of all
  changed weights on both sides.
- `sums`: sums of integers that wrap around at 64 bits. Such sums have no order: every device and every split
  gives the same, and a GPU hands over 16 bytes and not the tensor. `integer_sums` defines them and runs
  everywhere (1 GB/s on a core); on CUDA a Triton kernel gives the same ones (`digest_kernel`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from typing import Literal

import torch

from actors.errors import InvariantViolation

Algorithm = Literal["xxh3", "sums"]

WORD = 8
"""Bytes that are mixed at once."""
STEP = 0x9E3779B97F4A7C15 - 2**64
"""2^64 divided by the golden ratio, as int64: from the seed of one place to that of the next."""
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27, 31)
"""Of splitmix64's finalizer (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
CHUNK = 2**15
"""Words that the CPU mixes at once: 256 KiB, which stay in a core's cache with their keys."""
LARGE_CHUNK = 2**24
"""The same on other devices."""


def algorithm_for(devices: Iterable[str]) -> Algorithm:
    """The algorithm of a sync between these devices (`cpu`, `cuda`, ...)."""
    return "xxh3" if set(devices) <= {"cpu"} else "sums"


def digest_of(tensor: torch.Tensor, algorithm: Algorithm = "xxh3") -> str:
    """Digest of one tensor. `Digests` asks a device only once for many.

    Raises:
        InvariantViolation: `xxh3` of a tensor that is not on the CPU.
    """
    return _xxh3(tensor) if algorithm == "xxh3" else _text(tensor, _sums(tensor).tolist())


class Digests:
    """Digests of many tensors by name. On a device they stay sums until they are read: taking one waits for
    nothing."""

    def __init__(self, algorithm: Algorithm = "xxh3") -> None:
        self.algorithm: Algorithm = algorithm
        self._texts: dict[str, str] = {}
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """Name -> a tensor without storage, of the shape and dtype, and the sums."""

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Digest a tensor as it is now; it may be changed afterwards."""
        if self.algorithm == "xxh3":
            self._texts[name] = _xxh3(tensor)
        else:
            self._sums[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), _sums(tensor)

    def read(self) -> dict[str, str]:
        """Name -> digest of all that were taken, sorted."""
        if self._sums:
            found = torch.stack([sums for _, sums in self._sums.values()]).tolist()
            for (name, (like, _)), sums in zip(self._sums.items(), found):
                self._texts[name] = _text(like, sums)
            self._sums.clear()
        return dict(sorted(self._texts.items()))


def integer_sums(tensor: torch.Tensor, first: int = 0) -> torch.Tensor:
    """int64 (2,), where the tensor is: the sums over its bytes.

    The bytes, filled up with zeros, are words w_i of 64 bits, the least significant byte first. Modulo 2^64,
    with m the finalizer of splitmix64, in which every bit of the input turns half of the output's:

        k_i = m((i + 1) * STEP),   h_i = m(w_i xor k_i),   sums = (sum of h_i, sum of h_i * (k_i | 1)).

    A word's place is in its key: two that swap places change both sums. The second sum has weights, so that
    changes that happen to cancel in the first one don't cancel there.

    `first`: number of the first word within a larger tensor. The sums of its parts add up to its own.
    """
    words = words_of(tensor)
    sums = torch.zeros(2, dtype=torch.int64, device=words.device)
    step = CHUNK if words.device.type == "cpu" else LARGE_CHUNK
    for chunk in words.split(step):
        keys = torch.arange(first + 1, first + 1 + chunk.numel(), device=words.device).mul_(STEP)
        keys = _mixed(keys)
        mixed = _mixed(chunk ^ keys)
        sums += torch.stack([mixed.sum(), (mixed * keys.bitwise_or_(1)).sum()])
        first += chunk.numel()
    return sums


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    """int64 (words,): a tensor's bytes in its own order, filled up with zeros; a view where that can be."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    lacking = -raw.numel() % WORD
    if lacking or raw.storage_offset() % WORD:
        raw = torch.cat([raw, torch.zeros(lacking, dtype=torch.uint8, device=raw.device)])
    return raw.view(torch.int64)


def _sums(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cuda and _has_triton():
        from actors.sync.digest_kernel import integer_sums as by_kernel

        return by_kernel(words_of(tensor))
    return integer_sums(tensor)


@cache
def _has_triton() -> bool:
    """torch's builds for CUDA bring Triton along. Without it the sums are the same, in many more passes."""
    return find_spec("triton") is not None


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """The finalizer, in place."""
    *before, last = SHIFTS
    for bits, factor in zip(before, FACTORS):
        values.bitwise_xor_(_shifted(values, bits)).mul_(factor)
    return values.bitwise_xor_(_shifted(values, last))


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted to the right, filled up with zeros: torch's int64 fills up with the sign."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _text(like: torch.Tensor, sums: list[int]) -> str:
    text = f"{tuple(like.shape)}|{like.dtype}|{sums}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _xxh3(tensor: torch.Tensor) -> str:
    from xxhash import xxh3_128

    if tensor.device.type != "cpu":
        raise InvariantViolation(
            "weight sync",
            "digest",
            f"a tensor on {tensor.device} would have to be copied to the host for its digest by xxh3",
        )
    state = xxh3_128(f"{tuple(tensor.shape)}|{tensor.dtype}|".encode())
    if tensor.numel():
        state.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()

"""The sums of `digests.integer_sums` as a Triton kernel: one pass over the words, which plain torch needs
thirty for. The same numbers, whatever the order in which blocks are added: sums that wrap around have none.

Imported on CUDA only. On a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1), for its test.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Words that a program mixes at once."""
ROUNDS = 4
"""Blocks of a program, one after the other. An expert's matrix of 3 MB then keeps 96 programs busy."""


def integer_sums(words: torch.Tensor, first: int = 0) -> torch.Tensor:
    """int64 (2,) of contiguous int64 (words,): `digests.integer_sums` of them."""
    programs = triton.cdiv(words.numel(), BLOCK * ROUNDS)
    found = torch.empty((programs, 2), dtype=torch.int64, device=words.device)
    if programs:
        _add_up[programs,](words, found, words.numel(), first, BLOCK, ROUNDS)
    return found.sum(0)


@triton.jit
def _mixed(values):  # type: ignore[no-untyped-def]
    # Unsigned: shifts fill up with zeros. The numbers are those of `digests`; a kernel can't read them there.
    values = (values ^ (values >> 30)) * 0xBF58476D1CE4E5B9
    values = (values ^ (values >> 27)) * 0x94D049BB133111EB
    return values ^ (values >> 31)


@triton.jit
def _add_up(words, found, size, first, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    begin = program.to(tl.int64) * (BLOCK * ROUNDS)
    plain = tl.zeros([BLOCK], dtype=tl.uint64)
    weighted = tl.zeros([BLOCK], dtype=tl.uint64)
    for turn in range(ROUNDS):
        at = begin + turn * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        word = tl.load(words + at, mask=inside, other=0).to(tl.uint64, bitcast=True)
        key = _mixed((at + first + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
        mixed = tl.where(inside, _mixed(word ^ key), 0)
        plain += mixed
        weighted += mixed * (key | 1)
    tl.store(found + 2 * program, tl.sum(plain.to(tl.int64, bitcast=True), 0))
    tl.store(found + 2 * program + 1, tl.sum(weighted.to(tl.int64, bitcast=True), 0))

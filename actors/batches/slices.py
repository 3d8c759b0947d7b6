"""Samples that an engine draws in slices of time, between which some come and others go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.batches.generations import Generations, SamplingSpec


@dataclass(frozen=True)
class Asked:
    """Samples that an engine is given, one request each, in the order in which it shall begin them."""

    numbers: Sequence[int]
    """Names of the samples, within their call."""
    prompts: Sequence[Sequence[int]]
    """Token ids."""
    sampling: SamplingSpec
    """`n` is 1."""
    seeds: Sequence[int]


@dataclass(frozen=True)
class Work:
    """Decoding steps of an engine, of all that was in it."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Result of a slice, for the samples of one call."""

    ended: list[int]
    made: Generations | None
    """The samples that ended, in this order; None for none."""
    so_far: dict[int, int]
    """Tokens of those that have not ended. 0: it waits, or its prompt was computed and no more."""
    returned: list[int]
    """Samples that were asked back, and have not ended: the engine has forgotten them."""
    seconds: float
    """Time since the slice before, or since the engine was given the first of these samples."""
    work: Work

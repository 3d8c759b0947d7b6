"""Samples that one engine draws in slices, as the pool asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.batches.generations import Generations, SamplingSpec
from actors.batches.slices import Asked, Progress
from actors.cluster.worker_group import WorkerGroup

STEP = 0.0
"""Seconds of a slice: no more than one decoding step."""


def begin(
    group: WorkerGroup,
    key: int,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSpec,
    seeds: Sequence[int],
    seconds: float = STEP,
) -> Progress:
    """The first slice of a sample of each prompt."""
    asked = Asked(range(len(prompts)), prompts, sampling, seeds)
    progress: Progress = group.call_rank(0, "advance", key, seconds, asked)
    return progress


def finish(
    group: WorkerGroup, key: int, first: Progress, seconds: float = STEP, give_back: Sequence[int] = ()
) -> tuple[Generations, list[Progress]]:
    """The samples in the order of their numbers, once all have ended, and all slices."""
    slices = [first]
    while slices[-1].so_far:
        slices.append(group.call_rank(0, "advance", key, seconds, None, give_back))
        give_back = ()
    ended = [number for one in slices for number in one.ended]
    made = Generations.join([one.made for one in slices if one.made is not None], 1, mixed=True)
    return made.select(np.argsort(ended)), slices

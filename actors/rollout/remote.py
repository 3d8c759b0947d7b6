"""Rollout engines as pool and evaluation see them: every call into their processes, with its types.

Each method is one remote call of the method of `RolloutEngine` that it names, where it is documented. All of
them return at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actors.cluster.futures import GroupFuture, WorkerFuture
from actors.sync.remote import UpdatableEngines

if TYPE_CHECKING:
    import numpy as np

    from actors.batches.generations import Generations, SamplingSpec


class RolloutEngines(UpdatableEngines):
    """Engines that generate: one rank a call, but for `expert_load`."""

    def generate(
        self,
        rank: int,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSpec,
        seeds: Sequence[int] | None = None,
    ) -> WorkerFuture[Generations]:
        return self.group.submit_rank(rank, "generate", prompts, sampling, seeds, phase="generate")

    def start_requests(
        self,
        rank: int,
        key: int,
        seconds: float,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSpec,
        seeds: Sequence[int],
    ) -> WorkerFuture[Generations | None]:
        return self.group.submit_rank(
            rank, "start_requests", key, seconds, prompts, sampling, seeds, phase="generate"
        )

    def poll(self, rank: int, key: int, seconds: float) -> WorkerFuture[Generations | None]:
        return self.group.submit_rank(rank, "poll", key, seconds, phase="generate")

    def expert_load(self) -> GroupFuture[np.ndarray | None]:
        return self.group.submit("expert_load", phase="call")

"""Rollout engines as the driver sees them: their processes, and every call into them with its types.

Loads no vLLM. Each method of `RolloutEngines` is one remote call of the method of `RolloutEngine` that it
names, where it is documented. All of them return at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actors.cluster.environment import engine_environment
from actors.cluster.futures import GroupFuture, WorkerFuture
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.supervision import Supervision
from actors.cluster.worker_group import WorkerGroup
from actors.sync.remote import UpdatableEngines

if TYPE_CHECKING:
    import numpy as np

    from actors.batches.generations import Generations, SamplingSpec
    from actors.batches.slices import Asked, Parsing, Progress


ROLLOUT = "actors.rollout.engine:RolloutEngine"
ROLLOUT_MODULES = ("torch", "vllm", "vllm.entrypoints.llm")
"""Modules that an engine needs before it can load a model, imported while the driver reads its data."""


def rollout_group(
    role: RoleSpec,
    limits: LimitsSpec,
    log_dir: str | Path,
    name: str = "rollout",
    env: Mapping[str, str] | None = None,
    beside: WorkerGroup | None = None,
    supervision: Supervision | None = None,
) -> WorkerGroup:
    """A group for `ROLLOUT`: independent vLLM engines. Not started yet. `env`: further variables; `beside`:
    the ranks with which they take turns; `supervision`: of the run."""
    gpus = role.gpus if beside is None else beside.role.gpus
    variables = {**(env or {}), **engine_environment(gpus > 0)}
    return WorkerGroup(
        name,
        role,
        limits,
        log_dir,
        preload=ROLLOUT_MODULES,
        env=variables,
        beside=beside,
        supervision=supervision,
    )


class RolloutEngines(UpdatableEngines):
    """Engines that generate, one rank a call."""

    def generate(
        self,
        rank: int,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSpec,
        seeds: Sequence[int] | None = None,
    ) -> WorkerFuture[Generations]:
        return self.group.submit_rank(rank, "generate", prompts, sampling, seeds, phase="generate")

    def advance(
        self,
        rank: int,
        key: int,
        seconds: float | None,
        asked: Asked | None = None,
        give_back: Sequence[int] = (),
    ) -> WorkerFuture[Progress]:
        return self.group.submit_rank(rank, "advance", key, seconds, asked, give_back, phase="generate")

    def check_parser(self, parsing: Parsing) -> GroupFuture[str]:
        return self.group.submit("check_parser", parsing, phase="load")

    def expert_load(self, rank: int) -> WorkerFuture[np.ndarray | None]:
        return self.group.submit_rank(rank, "expert_load", phase="call")

"""Processes of the rollout role: the class that works in them, and what they import before it is made."""

from __future__ import annotations

from pathlib import Path

from actors.cluster.environment import engine_environment
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup

ROLLOUT = "actors.rollout.engine:RolloutEngine"
ROLLOUT_MODULES = ("torch", "vllm", "vllm.entrypoints.llm")
"""Modules that an engine needs before it can load a model, imported while the driver reads its data."""


def rollout_group(
    role: RoleSpec, limits: LimitsSpec, log_dir: str | Path, name: str = "rollout"
) -> WorkerGroup:
    """A group for `ROLLOUT`: independent vLLM engines. Not started yet."""
    return WorkerGroup(
        name, role, limits, log_dir, preload=ROLLOUT_MODULES, env=engine_environment(role.gpus > 0)
    )

"""Turns of the policy and of engines on its devices (`roles.rollout.share`), over a whole run."""

from __future__ import annotations

from collections.abc import Callable

from actors.cluster import EngineBytes, OneDevice, Turns, WorkerGroup
from pipeline.roles import ROLLOUT, RolesSpec


def turns_of(
    roles: RolesSpec,
    policy: Callable[[], WorkerGroup | None],
    engines: Callable[[], WorkerGroup | None],
    note: Callable[[str], None],
) -> Turns:
    """Turns of a run's processes; nothing where each role has devices of its own. Arguments as of
    `OneDevice`."""
    if not roles.alternates(ROLLOUT):
        return Turns()
    share = roles.rollout.engine.gpu_memory_utilization
    offload = roles.rollout.offload
    return OneDevice(policy, engines, offload, lambda rank: EngineBytes.by_share(share, rank), note)

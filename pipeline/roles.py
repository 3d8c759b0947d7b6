"""Roles of a run: what a model is for, and whose processes serve it."""

from __future__ import annotations

from pydantic import Field

from actors.cluster.spec import RoleSpec
from actors.rollout.spec import EngineOptions
from actors.spec import Spec
from pipeline.stages.specs.registry import StageSpec


class RolloutRoleSpec(RoleSpec):
    """Engines: a process each, and how each is built."""

    engine: EngineOptions = Field(default_factory=EngineOptions)
    """How each engine is built, by vLLM's field names."""


class RolesSpec(Spec):
    """Where each role lives."""

    policy: RoleSpec = Field(default_factory=RoleSpec)
    """The model being trained: data-parallel ranks."""
    reference: RoleSpec = Field(default_factory=lambda: RoleSpec(share="policy"))
    """Frozen reference. By default a view of the policy's base; its own actors where that base moves."""
    critic: RoleSpec = Field(default_factory=lambda: RoleSpec(share="policy"))
    """PPO's critic. By default a view of the policy's base."""
    reward: RoleSpec = Field(default_factory=lambda: RoleSpec(share="policy"))
    """Reward models that online stages ask. By default views of the policy's base."""
    rollout: RolloutRoleSpec = Field(default_factory=RolloutRoleSpec)
    """vLLM engines, for the online stages and for evaluation."""


def roles_of(stage: StageSpec) -> set[str]:
    """Roles that work while a stage runs."""
    works = {
        "policy": True,
        "reference": stage.has_reference,
        "critic": stage.critic is not None,
        "reward": bool(stage.reward_models),
        "rollout": stage.online,
    }
    return {name for name, needed in works.items() if needed}

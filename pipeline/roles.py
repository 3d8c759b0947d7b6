"""Roles of a run: what a model is for, and whose processes serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from actors.cluster.spec import RoleSpec
from actors.rollout.spec import EngineOptions
from actors.spec import Spec
from pipeline.stages.specs.registry import (
    PpoStage,
    ReferencedStage,
    RlStage,
    StageSpec,
)

if TYPE_CHECKING:
    pass


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
    if isinstance(stage, ReferencedStage):
        return {"policy", "reference"}
    if not isinstance(stage, RlStage):
        return {"policy"}
    critic = {"critic"} if isinstance(stage, PpoStage) else set()
    models = {"reward"} if any(one.kind == "model" for one in stage.rewards) else set()
    return {"policy", "reference", "rollout"} | critic | models

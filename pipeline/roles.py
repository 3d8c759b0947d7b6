"""Roles of a run: a table of what each is for, when it works, whose processes may serve it, what these hold.

All that differs between roles is in a row of `ROLES`; starting processes, rules of the config, plans and the
dry run ask the table. What a stage does with a role is said where its context is made
(`pipeline.execution.contexts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from actors.cluster import Offload, RoleSpec
from actors.rollout.spec import EngineOptions
from actors.spec import Spec
from pipeline.stages.specs.registry import StageSpec

POLICY, REFERENCE, CRITIC, REWARD = "policy", "reference", "critic", "reward"
ROLLOUT, JUDGE = "rollout", "judge"


@dataclass(frozen=True)
class Role:
    """One row of the table."""

    purpose: str
    """Description of its key in `roles:`."""
    works_in: Callable[[StageSpec], bool]
    """Stages that need it."""
    holds: Literal["model", "engine"]
    """Each of its processes is a rank of model workers, or a vLLM engine."""
    may_share: str | None = None
    """Role whose processes can serve it too, as they do by default; None: it has its own."""
    may_alternate: str | None = None
    """Role on whose devices its processes can be too, in turns; None: they have their own."""
    evaluates: bool = False
    """Evaluation on held-out prompts asks it."""


ROLES: dict[str, Role] = {
    POLICY: Role(
        "The model being trained: data-parallel ranks.",
        works_in=lambda stage: True,
        holds="model",
    ),
    REFERENCE: Role(
        "Frozen reference. By default a view of the policy's base; its own actors where that base moves.",
        works_in=lambda stage: stage.has_reference,
        holds="model",
        may_share=POLICY,
    ),
    CRITIC: Role(
        "PPO's critic. By default a view of the policy's base.",
        works_in=lambda stage: stage.critic is not None,
        holds="model",
        may_share=POLICY,
    ),
    REWARD: Role(
        "Reward models that online stages ask. By default views of the policy's base.",
        works_in=lambda stage: bool(stage.reward_models),
        holds="model",
        may_share=POLICY,
    ),
    ROLLOUT: Role(
        "vLLM engines, for the online stages and for evaluation.",
        works_in=lambda stage: stage.online,
        holds="engine",
        may_alternate=POLICY,
        evaluates=True,
    ),
    JUDGE: Role(
        "vLLM engines with a model of its own, for rewards of `kind: judge` without an endpoint.",
        works_in=lambda stage: bool(stage.judge_models),
        holds="engine",
    ),
}
"""Every role, in the order of the configuration. To add one: a row, and its field in `RolesSpec`."""
VIEWS = tuple(name for name, role in ROLES.items() if role.may_share is not None)
"""Roles that can be views of another one's processes."""
MODEL_ROLES = tuple(name for name, role in ROLES.items() if role.holds == "model")
ENGINE_ROLES = tuple(name for name, role in ROLES.items() if role.holds == "engine")


class RolloutRoleSpec(RoleSpec):
    """Engines: a process each, and how each is built."""

    share: str | None = None
    """`policy`: take turns with the policy on its devices, engine i on that of rank i; `workers` is then by
    default one for each rank. Excludes what the policy's processes reserve. Null: devices of their own."""
    engine: EngineOptions = Field(default_factory=EngineOptions)
    """Options of each engine, by vLLM's field names."""
    offload: Offload = "auto"
    """With `share`: what of the policy goes to the host while engines are awake: `none`, `optimizer`
    (gradients and moments), `all` (weights too), or `auto`, the least that makes room for the engine."""

    beside_share: ClassVar[tuple[str, ...]] = ("share", "workers", "threads", "engine", "offload")
    shares: ClassVar[str] = "devices"


def _key(role: str) -> Any:
    """The field of a role: its purpose, and its processes by default."""
    row = ROLES[role]
    kind = RoleSpec if row.holds == "model" else RolloutRoleSpec
    share = row.may_share
    return Field(
        default_factory=lambda: kind() if share is None else kind(share=share), description=row.purpose
    )


class RolesSpec(Spec):
    """Processes of each role."""

    policy: RoleSpec = _key(POLICY)
    reference: RoleSpec = _key(REFERENCE)
    critic: RoleSpec = _key(CRITIC)
    reward: RoleSpec = _key(REWARD)
    rollout: RolloutRoleSpec = _key(ROLLOUT)
    judge: RolloutRoleSpec = _key(JUDGE)

    def of(self, role: str) -> RoleSpec:
        """Settings of a role."""
        spec: RoleSpec = getattr(self, role)
        return spec

    def engine_of(self, role: str) -> EngineOptions:
        """Options of a role whose processes are engines."""
        spec: RolloutRoleSpec = getattr(self, role)
        return spec.engine

    def server_of(self, role: str) -> str:
        """The role whose processes serve `role`: another one where it is a view."""
        return role if role in ENGINE_ROLES else self.of(role).share or role

    def host_of(self, role: str) -> str:
        """The role whose devices `role` is on."""
        return self.of(role).share or role

    def gpus_of(self, role: str) -> float:
        """GPUs that each process of a role has, alone or in turns."""
        return self.of(self.host_of(role)).gpus

    def alternates(self, role: str) -> bool:
        """True where the processes of a role take turns with those of another one."""
        return role in ENGINE_ROLES and self.of(role).share is not None

    def with_processes(self, roles: Iterable[str]) -> list[str]:
        """Processes that these roles need, by role, in the order of the configuration: their own, and those
        that they take turns with."""
        wanted = set(roles)
        wanted |= {self.host_of(name) for name in wanted if self.alternates(name)}
        return [name for name in ROLES if name in wanted and self.server_of(name) == name]


def roles_of(stage: StageSpec) -> set[str]:
    """Roles that work while a stage runs."""
    return {name for name, role in ROLES.items() if role.works_in(stage)}


def evaluation_roles() -> set[str]:
    """Roles that work while models are evaluated on held-out prompts."""
    return {name for name, role in ROLES.items() if role.evaluates}

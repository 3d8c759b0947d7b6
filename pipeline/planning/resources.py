"""Resources that a run will need, before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.cluster import RoleSpec, check_cluster, is_local
from actors.errors import attempt
from pipeline.roles import ROLES, evaluation_roles, roles_of

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.stages.specs.registry import AnyStage


def working_roles(config: RunConfig) -> list[str]:
    """Roles that some stage or the evaluation uses, in the order of the configuration."""
    works = {role for stage in config.stages.values() for role in roles_of(stage)}
    if config.eval is not None:
        works |= evaluation_roles()
    return [name for name in ROLES if name in works]


def machine_problems(config: RunConfig, roles: Iterable[str] | None = None) -> list[str]:
    """Resources that roles ask for and this machine lacks, where the run would be a local one.

    `roles`: those that will work; None: all that some stage or the evaluation uses.
    """
    problems: list[str] = []
    if is_local(config.ray.address):
        specs = {name: config.roles.of(name) for name in (working_roles(config) if roles is None else roles)}
        attempt(problems, "roles", check_cluster, specs, num_cpus=config.ray.num_cpus)
    return problems


@dataclass(frozen=True)
class RolePlan:
    """Processes and resources of one role."""

    processes: int
    """Of its own; 0 where it shares another role's."""
    shares: str | None
    """Role whose processes it works on."""
    layout: str
    """Placement of its processes on nodes, and what they share of one model."""
    resources: dict[str, float]
    """Ray's names (CPU, GPU, custom ones) -> what its processes reserve together."""

    @classmethod
    def of(cls, role: RoleSpec) -> RolePlan:
        if role.share is not None and role.shares == "devices":
            return cls(role.workers, role.share, f"in turns on {role.share}'s devices", {})
        if role.share is not None:
            return cls(0, role.share, f"on {role.share}'s processes", {})
        asked = {"CPU": role.cpus, "GPU": role.gpus, **role.resources}
        reserved = {kind: role.workers * amount for kind, amount in asked.items() if amount}
        return cls(role.workers, None, _laid_out(role), reserved)


@dataclass(frozen=True)
class Plan:
    """Processes and resources of a run on its cluster."""

    roles: dict[str, RolePlan]
    """Those that some stage or the evaluation uses, in the order of the configuration."""
    text: str
    """The stages and roles in words, as `raylign validate` prints them."""

    @classmethod
    def of(cls, config: RunConfig) -> Plan:
        return cls(role_plans(config), cluster_plan(config))

    @property
    def processes(self) -> int:
        """Of all roles together."""
        return sum(role.processes for role in self.roles.values())

    @property
    def resources(self) -> dict[str, float]:
        """Of all roles together."""
        return _sum(self.roles.values())


def role_plans(config: RunConfig) -> dict[str, RolePlan]:
    """Processes and resources of each role that works."""
    return {name: RolePlan.of(config.roles.of(name)) for name in working_roles(config)}


def _sum(roles: Iterable[RolePlan]) -> dict[str, float]:
    total: dict[str, float] = {}
    for role in roles:
        for kind, amount in role.resources.items():
            total[kind] = total.get(kind, 0) + amount
    return total


def describe(config: RunConfig) -> list[list[str]]:
    """Role, where it lives, processes, what they reserve: a row a role that works, and the sum."""
    roles = role_plans(config)
    rows = [
        [name, role.layout, str(role.processes), "" if role.shares else _amounts(role.resources)]
        for name, role in roles.items()
    ]
    together = sum(role.processes for role in roles.values())
    return [*rows, ["together", "", str(together), _amounts(_sum(roles.values()))]]


def _laid_out(role: RoleSpec) -> str:
    """Placement of its processes on nodes, and what they share of one model."""
    parts: list[str] = [role.placement]
    if role.sharding != "none":
        parts.append(f"sharding {role.sharding}")
    if role.expert_parallel_size is not None:
        parts.append(f"among {role.expert_parallel_size} each")
    if role.tensor_parallel_size > 1:
        parts.append(f"{role.tensor_parallel_size} hold one model together")
    if role.sequence_parallel_size > 1:
        parts.append(f"{role.sequence_parallel_size} share out each row")
    return ", ".join(parts)


def _amounts(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in amounts.items()) or "nothing"


def _count(number: float, thing: str) -> str:
    return f"{number:g} {thing}" + ("" if number == 1 else "s")


def cluster_plan(config: RunConfig) -> str:
    """Plan of the same command without --dry-run, as text."""
    lines = ["On the cluster this would run:"]
    for name, stage in config.stages.items():
        steps, epochs = _count(stage.max_steps, "step"), _count(stage.num_train_epochs, "epoch")
        length = steps if stage.max_steps > 0 else epochs
        lines.append(f"  {name} ({stage.type}) from {config.init_of(name)}: {length}, {_step(stage)}")
    for role, where, workers, asked in describe(config):
        processes = f"{workers} x process, {asked}" + (f" ({where})" if where else "")
        lines.append(f"  {role}: {processes if asked else where}")
    lines.append(f"  base {config.model.base} in {config.model.dtype}, output in {config.output_dir}")
    return "\n".join(lines)


def _step(stage: AnyStage) -> str:
    if not stage.online:
        return (
            f"{stage.batch_size} rows a step, up to {stage.max_length or 'the model limit of'} tokens a row"
        )
    sources = [
        reward.says if reward.weight == 1 else f"{reward.weight:g} x {reward.says}"
        for reward in stage.rewards
    ]
    teacher = getattr(stage, "teacher", None)
    own = [f"the environment {stage.env}"] if stage.env is not None else []
    own += [f"the agent {stage.agent}"] if stage.agent is not None else []
    rewards = ", ".join([*sources, *own, *([f"the teacher {teacher}"] if teacher is not None else [])])
    rounds, ahead = stage.max_resampling_rounds, stage.staleness
    again = f" (up to {_count(rounds, 'further round')} for prompts of equal rewards)" if rounds else ""
    older = f"; samples are generated up to {_count(ahead, 'step')} ahead" if ahead else ""
    return (
        f"a step samples {_count(stage.prompts_per_step, 'prompt')} x {stage.num_generations}{again}, up to "
        f"{stage.max_completion_length} new tokens, scores them by {rewards}, takes "
        f"{_count(stage.updates_per_step, 'optimizer step')} of {stage.batch_size} samples, syncs the "
        f"engines{older}"
    )

"""Bytes of every process of a run, by what they are for, and where the processes lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.planning.costs.activations import PassSize, scoring_pass, training_pass
from pipeline.planning.costs.engines import engine_memory
from pipeline.planning.costs.passes import StageWork, largest_pass, work_of
from pipeline.planning.costs.payloads import payload_bytes
from pipeline.planning.costs.weights import (
    MOMENTS,
    Holding,
    adapter_bytes,
    base_bytes,
    dequantised_bytes,
    gathered_bytes,
    trained_bytes,
)
from pipeline.roles import (
    CRITIC,
    ENGINE_ROLES,
    JUDGE,
    POLICY,
    REFERENCE,
    REWARD,
    ROLES,
    evaluation_roles,
    roles_of,
)

if TYPE_CHECKING:
    from actors.cluster import RoleSpec
    from actors.models.facts import BaseSizes
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.costs.devices import Device
    from pipeline.stages.specs.registry import AnyStage, OnlineStage

MIB = 2**20
FRAMEWORK = {"cpu": 450 * MIB, "gpu": 1500 * MIB, "engine": 1100 * MIB}
"""Of a process beside its model: Python with torch, transformers, PEFT, Ray, and with vLLM (a GRPO run of the
embedded base took 432 and 1,160 MiB at most); CUDA's context, its libraries, NCCL's buffers (assumed)."""
ALWAYS = ("base", "adapters", "gradients", "moments", "weights", "one sequence's cache")
"""Parts that are there whatever rows come. Processes that are forked from one share what they imported."""


@dataclass(frozen=True)
class ProcessMemory:
    """One process of a role, or several that are alike, while a stage works."""

    role: str
    ranks: range
    """Numbers of these processes in their role."""
    stage: str
    """`evaluation` while models are evaluated."""
    parts: dict[str, int]
    """Bytes by what they are for."""
    on_gpu: bool
    room: int
    """Bytes of its device that may be planned with; of the whole machine without a GPU."""
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def certain(self) -> int:
        """Without what depends on the rows that come."""
        return sum(size for part, size in self.parts.items() if part in ALWAYS)

    @property
    def name(self) -> str:
        first, last = self.ranks[0], self.ranks[-1]
        return f"{self.role} {first}" if first == last else f"{self.role} {first}-{last}"


@dataclass(frozen=True)
class Budget:
    """Of one run on one kind of device: what all its processes need."""

    config: RunConfig
    sizes: BaseSizes
    device: Device
    longest: dict[str, int]
    """Stage -> tokens of its longest sequence, where its data are known."""
    judges: Mapping[str, BaseSizes] = field(default_factory=dict)
    """Models that the run's engines judge samples with, by their names in the config."""

    def processes(self) -> list[ProcessMemory]:
        """Of every stage in order, then of the evaluation."""
        found = [p for name in self.config.stages for p in self._of_stage(name)]
        if self.config.eval is not None:
            found += [self._engine(role, "evaluation", 0) for role in sorted(evaluation_roles())]
        return found

    def together(self) -> int:
        """Bytes of all processes that live at one time: those of a role stay from stage to stage, as large as
        they ever were."""
        largest: dict[str, int] = {}
        processes = self.processes()
        for role, stage in dict.fromkeys((p.role, p.stage) for p in processes):
            here = sum(p.total * len(p.ranks) for p in processes if (p.role, p.stage) == (role, stage))
            largest[role] = max(here, largest.get(role, 0))
        return sum(largest.values())

    def work(self, name: str) -> StageWork:
        return work_of(self.config.stages[name], self.sizes.positions, self.longest.get(name))

    def _of_stage(self, name: str) -> Iterator[ProcessMemory]:
        stage = self.config.stages[name]
        working = roles_of(stage)
        for role in ROLES:
            if role not in working or self.config.roles.server_of(role) != role:
                continue
            if role == JUDGE:
                (model,) = stage.judge_models
                if model in self.judges:
                    yield self._engine(role, name, 0, self.judges[model])
            elif role in ENGINE_ROLES:
                assert stage.online
                yield self._engine(role, name, self._payload(stage))
            else:
                yield from self._ranks(role, name, stage)

    def _ranks(self, role: str, name: str, stage: AnyStage) -> Iterator[ProcessMemory]:
        spec = self.config.roles.of(role)
        holding = Holding.of(self.config.model, spec)
        served = [one for one in roles_of(stage) if self.config.roles.server_of(one) == role]
        parts = {
            "base": base_bytes(self.sizes, holding),
            "adapters": self.adapters_held(role, name) * adapter_bytes(self.sizes, holding),
            **self._of_training(role, stage, holding),
        }
        parts |= self._of_passes(role, name, stage, holding, served)
        parts["dequantised weights"] = dequantised_bytes(self.sizes, holding)
        parts["framework"] = FRAMEWORK["gpu" if holding.on_gpu else "cpu"]
        room, n = self.device.room, spec.workers
        lead = dict(parts)
        if role == POLICY and stage.online:
            lead["version that is sent"] = self._payload(stage)
        alike = lead == parts
        yield ProcessMemory(role, range(n if alike else 1), name, _there(lead), holding.on_gpu, room)
        if n > 1 and not alike:
            yield ProcessMemory(role, range(1, n), name, _there(parts), holding.on_gpu, room)

    def _payload(self, stage: OnlineStage) -> int:
        return payload_bytes(stage.sync.payload, self.sizes, self.config.model)

    def _of_training(self, role: str, stage: AnyStage, holding: Holding) -> dict[str, int]:
        """Gradients and moments: of the policy, and of a critic on the same processes."""
        trains = [one for one in (POLICY, CRITIC) if self.config.roles.server_of(one) == role]
        trains = [one for one in trains if one in roles_of(stage)]
        one = trained_bytes(self.sizes, holding) * len(trains)
        return {"gradients": one, "moments": one * MOMENTS[stage.optim]}

    def _of_passes(
        self, role: str, name: str, stage: AnyStage, holding: Holding, served: list[str]
    ) -> dict[str, int]:
        """The largest pass that these ranks make, for any role that they serve."""
        spec, memory = self.config.roles.of(role), self.device.memory
        gathered, with_head = (gathered_bytes(self.sizes, holding, at_head) for at_head in (False, True))
        largest: dict[str, int] = {}
        for one in served:
            size = self.largest(name, spec, reads_logps=_reads_logps(one, stage))
            if one not in (POLICY, CRITIC):
                found = {
                    "activations": scoring_pass(self.sizes, holding, size, memory),
                    "gathered layers": gathered,
                }
            else:
                made = training_pass(self.sizes, holding, size, memory)
                head_first = made.head + with_head >= made.again + made.backward + gathered
                found = {
                    "activations": made.saved,
                    "one layer again": 0 if head_first else made.again,
                    "backward of a layer": 0 if head_first else made.backward,
                    "head's block": made.head if head_first else 0,
                    "gaps in the heap": made.gaps,
                    "gathered layers": with_head if head_first else gathered,
                }
            if sum(found.values()) > sum(largest.values()):
                largest = found
        return largest

    def largest(self, name: str, role: RoleSpec, reads_logps: bool = True) -> PassSize:
        """The largest micro-batch of a stage on one rank of a role."""
        stage = self.config.stages[name]
        packs = stage.packing is not False and not role.gpus
        return largest_pass(
            self.work(name), role, stage.max_tokens_per_micro_batch, reads_logps, shares=packs
        )

    def adapters_held(self, role: str, name: str) -> int:
        """Adapters in the memory of a role's ranks while a stage works: of every stage since processes were
        last released, and of what it compares with (`pipeline.execution.contexts`)."""
        config = self.config
        if config.model.lora is None:
            return 0
        held: set[str] = set()
        for one, spec in config.stages.items():
            held |= {source for source in self._adapters_of(one, role) if source != "base"}
            if one == name:
                break
            if not spec.keep_warm:
                held = set()
        return len(held)

    def _adapters_of(self, name: str, role: str) -> Iterator[str]:
        config, stage = self.config, self.config.stages[name]
        serves = {one: config.roles.server_of(one) == role for one in (POLICY, REFERENCE, CRITIC, REWARD)}
        if serves[POLICY]:
            yield from (config.init_of(name), name)
        if serves[REFERENCE] and stage.has_reference:
            yield config.reference_of(name) or "base"
        if serves[CRITIC] and stage.critic is not None:
            yield from (config.critic_init_of(name) or "base", f"{name}:critic")
        if serves[REWARD]:
            yield from stage.reward_models

    def _engine(self, role: str, stage: str, payload: int, other: BaseSizes | None = None) -> ProcessMemory:
        """`other`: sizes of its model, where that is not the run's base."""
        options, roles = self.config.roles.engine_of(role), self.config.roles
        on_gpu = roles.gpus_of(role) > 0
        memory = self.device.memory if on_gpu else None
        made = engine_memory(other or self.sizes, options, self.config.model.dtype, memory, payload)
        workers = options.tensor_parallel_size
        one = min(made.cache, made.per_token * made.positions // workers)
        parts = {
            "weights": made.weights,
            "one sequence's cache": one,
            "cache": made.cache - one,
            "workspace": made.workspace,
            "new version": made.reload,
            "framework": FRAMEWORK["gpu" if on_gpu else "engine"],
        }
        notes = [f"cache of {made.tokens(workers):,} tokens, {made.sequences(workers):,} whole sequences"]
        if not made.sequences(workers):
            parts["one sequence's cache"] = made.per_token * made.positions // workers
            notes = [f"no room for the cache of one sequence of {made.positions:,} tokens"]
        if roles.alternates(role):
            notes.append("in turns with the policy on its device")
        count = roles.of(role).workers * workers
        room = self.device.room
        return ProcessMemory(role, range(count), stage, _there(parts), on_gpu, room, tuple(notes))


def _reads_logps(role: str, stage: AnyStage) -> bool:
    """Critics and reward models have a scalar head, and make no logits."""
    return role in (POLICY, REFERENCE) and stage.makes == "policy"


def _there(parts: dict[str, int]) -> dict[str, int]:
    return {part: size for part, size in parts.items() if size}

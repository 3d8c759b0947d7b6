"""The actors of a run, by role: started together, kept through all stages, rebuilt only where needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.cluster import check_cluster, start_ray, stop_ray
from actors.group import HOST, ROLLOUT, ActorGroup, Pending, host_group, rollout_group
from actors.host_spec import HostSpec
from actors.rollout import EngineSpec
from actors.runtime import RoleSpec
from pipeline.artifacts import MANIFEST
from pipeline.rundir import RunDirectory
from pipeline.stages.evaluate import Weights
from pipeline.stages.prepared import PreparedRl, PreparedStage
from pipeline.stages.reference import ReferenceFeed, ReferenceLogps, first_use_order
from pipeline.stages.rl import RlContext
from pipeline.stages.spec import DpoStage, PpoStage, RlStage, StageSpec
from pipeline.stages.train import TrainContext
from pipeline.stages.views import View

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig
    from pipeline.nodes import Graph, Node

CHUNK_BATCHES = 4
"""Training batches per chunk of reference log-probabilities: fewer would wait for Ray more often, more
would delay the first step."""


def adapter_name(model: str) -> str:
    """Name inside a host of a stage's adapter, or of the one that `model.base` itself names.

    torch's module names have no dots.
    """
    return "initial_adapter" if model == "base" else model.replace(".", "_")


class Host:
    """A group of ranks with one base, and which artifacts' adapters it holds by now."""

    def __init__(self, group: ActorGroup, spec: HostSpec, weights: Weights, building: Pending) -> None:
        self.group, self.spec, self.base = group, spec, weights.base
        self._building: Pending | None = building
        self.holds = weights.fingerprint
        """Fingerprint of the weights that the base's own parameters are (full fine-tuning moves them)."""
        self.adapters: dict[str, str] = {}

    def ready(self) -> float:
        """Wait until the base is loaded; returns the slowest rank's seconds, 0 if it was there already."""
        building, self._building = self._building, None
        return max(building.result()) if building else 0.0

    def view(self, weights: Weights, name: str) -> str | None:
        """Role name under which this host computes with the given weights; loads their adapter if needed."""
        if weights.adapter is None:
            return None
        if self.adapters.get(name) != weights.fingerprint:
            self.group.call("add_adapter", name, weights.adapter, False, phase="load")
            self.adapters[name] = weights.fingerprint
        return name


@dataclass(frozen=True)
class Events:
    """What a stage tells the run, and asks it."""

    on_step: Callable[[int, dict[str, Any]], None]
    on_log: Callable[[dict[str, Any]], None]
    stop_asked: Callable[[], bool]


def roles_of(stage: StageSpec) -> set[str]:
    """Roles that work while a stage runs."""
    if isinstance(stage, DpoStage):
        return {"policy", "reference"}
    if not isinstance(stage, RlStage):
        return {"policy"}
    critic = {"critic"} if isinstance(stage, PpoStage) else set()
    models = {"reward"} if any(one.kind == "model" for one in stage.rewards) else set()
    return {"policy", "reference", "rollout"} | critic | models


class Fleet:
    """Starts what a graph needs and hands each stage its host, its reference and its context."""

    def __init__(
        self, config: RunConfig, directory: RunDirectory, startup: dict[str, float], fresh: bool = False
    ) -> None:
        """`fresh`: also ignore what earlier runs left in the reference cache."""
        self.config, self.directory, self.startup, self.fresh = config, directory, startup, fresh
        self._groups: dict[str, ActorGroup] = {}
        self._hosts: dict[str, Host] = {}
        self._feeds: dict[str, ReferenceFeed] = {}
        self._rollout_built = False
        self._ray = False
        self._starting: Future[None] | None = None
        self._later: list[str] = []
        # Lives as long as the fleet: Linux ties a local cluster's end to the thread that started it.
        self._thread = ThreadPoolExecutor(1, "start-ray")

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._starting is not None:
            self._starting.exception()
        if self.config.ray.address is not None:  # A local cluster takes its actors with it.
            for group in self._groups.values():
                group.shutdown()
        if self._ray:
            stop_ray()
        self._thread.shutdown()

    # --- Start ----------------------------------------------------------------------------------

    def prestart(self) -> None:
        """On a local cluster: let Ray and the first processes' imports begin while the driver reads on.

        Raises:
            UserError: the machine has less than the roles ask for; nothing was started.
        """
        roles = self._likely()
        if not roles or self.config.ray.address is not None:
            return
        check_cluster(self._specs(roles), num_cpus=self.config.ray.num_cpus)
        first = [name for name in roles if name in self._first(roles)]
        self._starting = self._thread.submit(self._start_ray, first)

    def start(self, graph: Graph) -> None:
        """The processes of the first stage; only Ray itself is waited for. The others: `start_others`.

        Raises:
            UserError: the cluster has less than the roles ask for; nothing was started on it.
        """
        began = time.monotonic()
        starting, self._starting = self._starting, None
        if starting is not None:
            starting.result()
        roles = self._needed(graph)
        self._later = [name for name in roles if name not in self._first(roles)]
        if roles:
            self._start_ray([])
            check_cluster(self._specs(roles))
            self._start_ray(self._first(roles))
        for name in set(self._groups) - set(roles):
            self._groups.pop(name).shutdown()
        self.startup["wait for ray"] = round(time.monotonic() - began, 2)
        if graph.pending:
            first = graph.pending[0]
            for name in sorted(set(self._first(roles)) & {"policy", "reference"}, reverse=True):
                self._host(name, first, first.start)

    def start_others(self) -> None:
        """The processes of later stages, once training runs: their imports run beside it."""
        later, self._later = self._later, []
        self._start_ray(later)

    def _first(self, roles: list[str]) -> list[str]:
        """Of these roles, those that the first open stage needs; imports of all at once would delay it."""
        path = self.directory.path
        for name, stage in self.config.stages.items():
            if not (path / name / MANIFEST).is_file():
                needed = roles_of(stage)
                return [name for name in roles if name in needed] or roles
        return roles

    def _start_ray(self, roles: list[str]) -> None:
        if not self._ray:
            spec = self.config.ray
            self._ray = True
            start_ray(spec.address, num_cpus=spec.num_cpus, object_store_memory=spec.object_store_memory)
        for name in roles:
            self._group(name)

    def _specs(self, roles: list[str]) -> dict[str, RoleSpec]:
        return {name: getattr(self.config.roles, name) for name in roles}

    def _likely(self) -> list[str]:
        """Roles that work on what has no finished result in the run directory."""
        path = self.directory.path
        open_stages = [s for name, s in self.config.stages.items() if not (path / name / MANIFEST).is_file()]
        wanted = {role for stage in open_stages for role in roles_of(stage)}
        if any(not (path / "eval" / f"{m}.json").is_file() for m in self.config.eval_models()):
            wanted.add("rollout")
        return self._own_processes(wanted)

    def _needed(self, graph: Graph) -> list[str]:
        self._feeds = {
            node.name: self._feed(node) for node in graph.pending if isinstance(node.spec, DpoStage)
        }
        wanted = {role for node in graph.pending for role in roles_of(node.spec) - {"reference"}}
        online = any(isinstance(node.spec, RlStage) for node in graph.pending)
        if online or not all(feed.cached for feed in self._feeds.values()):
            wanted.add("reference")
        if graph.evaluations_pending:
            wanted.add("rollout")
        return self._own_processes(wanted)

    def _own_processes(self, wanted: set[str]) -> list[str]:
        """Of these roles, those with processes of their own, in the order of the configuration."""
        roles = self.config.roles
        return [n for n in type(roles).model_fields if n in wanted and getattr(roles, n).share is None]

    def _group(self, name: str) -> ActorGroup:
        if name not in self._groups:
            role, limits, logs = getattr(self.config.roles, name), self.config.limits, self.directory.logs
            rollout = name == "rollout"
            group = rollout_group(role, limits, logs) if rollout else host_group(name, role, limits, logs)
            self._groups[name] = group.start()
        return self._groups[name]

    def _host(self, name: str, node: Node, weights: Weights) -> Host:
        """The role's host with the base of `weights`, kept from the stage before where it fits."""
        spec = self._host_spec(node, weights)
        host = self._hosts.get(name)
        if host is not None and self._fits(host, spec, weights):
            return host
        group = self._group(name)
        gpu = getattr(self.config.roles, name).gpus > 0
        building = group.build(
            HOST, spec.model_copy(update={"device": "cuda" if gpu else "cpu"}), distributed=True
        )
        host = self._hosts[name] = Host(group, spec, weights, building)
        return host

    @staticmethod
    def _fits(host: Host, spec: HostSpec, weights: Weights) -> bool:
        """The same base and settings; or, without adapters, a base that was just trained to these weights."""
        trained_to_it = weights.adapter is None and host.holds == weights.fingerprint
        model = host.spec.model.model_copy(
            update={"base": spec.model.base, "random_init": spec.model.random_init}
        )
        same_settings = spec == host.spec.model_copy(update={"model": model})
        return same_settings and (trained_to_it or host.spec.model == spec.model)

    def _host_spec(self, node: Node, weights: Weights) -> HostSpec:
        model = self.config.model
        fresh = model.random_init and node.init == "base"
        return HostSpec(
            model=model.model_copy(update={"base": weights.base, "random_init": fresh}),
            seed=self.config.seed,
        )

    def release(self) -> None:
        """End the training hosts (`keep_warm: false`); the next stage starts new ones."""
        for name in list(self._hosts):
            self._hosts.pop(name)
            self._groups.pop(name).shutdown()

    def _ready_host(self, name: str, node: Node, weights: Weights) -> Host:
        """The role's host, loaded and set to this stage's batching; its wait is part of the start-up."""
        host = self._host(name, node, weights)
        began = time.monotonic()
        host.ready()
        self.startup.setdefault(f"wait for {name}", round(time.monotonic() - began, 2))
        spec = node.spec
        host.group.call("set_batching", spec.packing, spec.max_tokens_per_micro_batch)
        return host

    # --- What a stage is given ------------------------------------------------------------------

    def train_context(self, node: Node, reference: ReferenceFeed | None, events: Events) -> TrainContext:
        """The policy with this stage's own adapter, started from its input, and the rest of the context."""
        return TrainContext(**self._common(node, events), reference=reference)

    def rl_context(self, node: Node, events: Events, tokenizer: Any) -> RlContext:
        """A view for every role of an online stage, the engines, and the sync between policy and engines."""
        from actors.pool import RolloutPool
        from actors.sync.weight_sync import WeightSync

        assert isinstance(node.spec, RlStage)
        assert isinstance(node.prepared, PreparedRl)
        assert node.reference is not None
        common = self._common(node, events)
        rollout = self.rollout()
        probes = [ids[: node.spec.sync.probe_tokens] for ids in node.prepared.data.token_ids]
        sync = WeightSync(
            common["host"],
            rollout,
            node.spec.sync,
            base_dir=node.start.base,
            role=common["role"],
            probes=probes[: node.spec.sync.probes],
        )
        return RlContext(
            **common,
            policy=View(common["host"], common["role"]),
            reference=self._view("reference", node, node.reference, self.config.reference_of(node.name)),
            critic=self._critic(node) if isinstance(node.spec, PpoStage) else None,
            reward_models={
                source: self._view("reward", node, model, source) for source, model in node.rewards.items()
            },
            rollout=RolloutPool(rollout, sync.restore),
            sync=sync,
            tokenizer=tokenizer,
        )

    def _common(self, node: Node, events: Events) -> dict[str, Any]:
        host = self._ready_host("policy", node, node.start)
        return {
            "host": host.group,
            "role": self._trainable(host, node),
            "directory": node.directory,
            "identity": node.identity,
            "dtype": self.config.model.dtype,
            "logging_steps": self.config.logging.logging_steps,
            "starts_as_reference": node.reference == node.start,
            "stop_asked": events.stop_asked,
            "on_step": events.on_step,
            "on_log": events.on_log,
            "card": lambda path, metrics: write_stage_card(self.config, node, path, metrics),
        }

    def _view(self, role: str, node: Node, weights: Weights, model: str) -> View:
        """A role that doesn't train: the weights of `model`, on the role's own host or on the policy's."""
        host = self._ready_host(getattr(self.config.roles, role).share or role, node, weights)
        return View(host.group, host.view(weights, adapter_name(model)))

    def _critic(self, node: Node) -> View:
        """An adapter of its own with a value head, from the weights that `critic_init` names."""
        assert node.critic is not None
        source = self._view("critic", node, node.critic, self.config.critic_init_of(node.name))
        name = adapter_name(f"{node.name}_critic")
        if source.role is None:
            source.group.call("add_adapter", name, None, True, phase="load")
        else:
            source.group.call("copy_adapter", source.role, name, True, phase="load")
        source.group.call("add_head", name, phase="load")
        return View(source.group, name)

    def _trainable(self, host: Host, node: Node) -> str | None:
        """A new adapter of this stage, equal to the weights that it starts from."""
        if self.config.model.lora is None:
            host.holds = node.identity.fingerprint
            return None
        name = adapter_name(node.name)
        source = host.view(node.start, adapter_name(node.init))
        if source is None:
            host.group.call("add_adapter", name, node.start.adapter, True, phase="load")
        else:
            host.group.call("copy_adapter", source, name, True, phase="load")
        host.adapters[name] = node.identity.fingerprint
        return name

    def reference_feed(self, node: Node) -> ReferenceFeed | None:
        """Reference log-probabilities of a DPO stage, already being computed; None for other stages."""
        feed = self._feeds.get(node.name)
        if feed is not None and not feed.cached:
            assert node.reference is not None
            share = self.config.roles.reference.share
            host = self._ready_host(share or "reference", node, node.reference)
            feed.start(
                host.group, host.view(node.reference, adapter_name(self.config.reference_of(node.name)))
            )
        return feed

    def _feed(self, node: Node) -> ReferenceFeed:
        spec, reference = node.spec, node.reference
        assert isinstance(spec, DpoStage)
        assert reference is not None
        settings: dict[str, Any] = {
            "reference": reference.fingerprint,
            "ld_alpha": spec.ld_alpha,
            "cache": self.directory.path.parent / ".cache" / "reference",
            "chunk_rows": CHUNK_BATCHES * spec.batch_size,
            "fresh": self.fresh,
        }
        assert isinstance(node.prepared, PreparedStage)
        data, held_out = node.prepared.data, node.prepared.eval_data
        train = ReferenceLogps(data, first_use_order(node.prepared.order), **settings)
        if held_out is None:
            return ReferenceFeed(train, None)
        return ReferenceFeed(train, ReferenceLogps(held_out, np.arange(held_out.n_rows), **settings))

    def rollout(self) -> ActorGroup:
        """The rollout engines, ready to load a model."""
        group = self._group("rollout")
        if not self._rollout_built:
            began = time.monotonic()
            engine = EngineSpec(
                dtype=self.config.model.dtype,
                trust_remote_code=self.config.model.trust_remote_code,
                **self.config.roles.rollout.engine.model_dump(),
            )
            group.ready().build(ROLLOUT, engine).result()
            self.startup["rollout actors"] = round(time.monotonic() - began, 2)
            self._rollout_built = True
        return group


def write_stage_card(config: RunConfig, node: Node, directory: Path, metrics: dict[str, Any]) -> None:
    """README.md of a stage's artifact."""
    from pipeline.artifacts import versions
    from pipeline.report import CardFacts, write_card

    names = ("learning_rate", "lr_scheduler_type", "batch_size", "max_length", "beta", "loss_type")
    settings = {name: getattr(node.spec, name) for name in names if hasattr(node.spec, name)}
    write_card(
        directory,
        CardFacts(
            name=f"{config.name}-{node.name}",
            stage_type=node.kind,
            base_model=config.model.base,
            is_adapter=config.model.lora is not None,
            started_from="" if node.init == "base" else node.init,
            datasets=[source.source for source in node.spec.data],
            settings=settings | {"steps": node.prepared.total_steps, "seed": node.prepared.seed},
            lora=config.model.lora.model_dump() if config.model.lora else {},
            metrics=metrics,
            versions=versions(),
        ),
    )

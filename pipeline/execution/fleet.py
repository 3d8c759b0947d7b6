"""The actors of a run, by role: started together, kept through all stages, rebuilt only where needed."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

from actors.cluster import (
    GroupFuture,
    MeasuredLimits,
    Replaced,
    RoleSpec,
    Supervision,
    WorkerFuture,
    WorkerGroup,
    actor_environment,
    bring_up,
    by_size,
    check_cluster,
    import_ray,
    is_local,
    passed_on,
    ray_lost,
    start_ray,
    stop_ray,
)
from actors.cluster.fast_start import ForkServer
from actors.errors import UserError
from actors.models.facts import BaseFacts, base_facts
from actors.rollout.remote import ROLLOUT as ENGINE
from actors.rollout.remote import rollout_group
from actors.rollout.spec import EngineSpec
from actors.trainer.remote import HOST_MODULES, ModelWorkers, host_group
from pipeline.artifacts.manifest import MANIFEST
from pipeline.artifacts.run_directory import RunDirectory
from pipeline.artifacts.weights import Weights
from pipeline.execution.hosts import Host, fits, host_spec
from pipeline.execution.reference_feeds import make_feed
from pipeline.execution.turns import turns_of
from pipeline.monitoring.phases import phase
from pipeline.planning.resources import machine_problems
from pipeline.roles import ENGINE_ROLES, POLICY, REFERENCE, ROLES, ROLLOUT, evaluation_roles, roles_of
from pipeline.stages.context import GivenUp, Stopped
from pipeline.stages.offline.reference import ReferenceFeed

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.nodes import Graph, Node


class Fleet:
    """Starts what a graph needs: groups of processes, and hosts on them; `contexts` hands them to stages."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        startup: dict[str, float],
        fresh: bool = False,
        note: Callable[[str], None] = lambda line: None,
        replaced: Callable[[Replaced], None] = lambda one: None,
    ) -> None:
        """`fresh`: also ignore what earlier runs left in the reference cache. `note`: says a line;
        `replaced`: hears of each process that was replaced."""
        self.config, self.directory, self.startup, self.fresh = config, directory, startup, fresh
        self._note = note
        self.local = is_local(config.ray.address)
        """The cluster is this machine, and ends with the run."""
        self._supervision = Supervision.of(config.limits)
        self._supervision.tell, self._supervision.replaced = note, replaced
        self._groups: dict[str, WorkerGroup] = {}
        self._hosts: dict[str, Host] = {}
        self.feeds: dict[str, ReferenceFeed] = {}
        """Of DPO stages, by name."""
        self._engines: dict[str, GroupFuture[float] | None] = {}
        """Roles whose engines' actors have been asked for; None: they are there."""
        self.measured: MeasuredLimits | None = None
        self._ray = self._left = False
        self._starting: Future[None] | None = None
        self._facts: Future[WorkerFuture[BaseFacts]] | None = None
        self._later: list[str] = []
        self._fork_server: ForkServer | None = None
        self.ray_line: str | None = None
        """Line on the way in which Ray was started or connected to; None before it was."""
        self._imports_apart: str | None = None
        """Why each process makes its own imports; None: the fork server makes them for all."""
        # Lives as long as the fleet: Linux ties a local cluster's end to the thread that started it.
        # Ray starts its processes from there, and they inherit that thread's mask: a closed terminal is for
        # the driver, which saves and then ends them. (An interrupt Ray itself keeps from them.)
        self._thread = ThreadPoolExecutor(1, "start-ray", _block_hangup)
        self.turns = turns_of(config.roles, self.policy_workers, self.built_engines, note)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        if self._starting is not None:
            self._starting.exception()
        if not self.local:  # A local cluster takes its actors with it.
            # Last started, first ended: some are in the bundles of others.
            for group in reversed(self._groups.values()):
                group.shutdown(kindly=not isinstance(error, KeyboardInterrupt | GivenUp))
        failed, lost = False, None
        if self._ray:
            failed = isinstance(error, Exception) and not isinstance(error, UserError | Stopped)
            lost = ray_lost(now=True)
            kept = stop_ray(failed)
            if kept is not None:
                self._note(f"Ray's own logs of this run are kept in {kept}")
        if self._fork_server is not None:
            self._fork_server.stop()
        self._thread.shutdown(cancel_futures=True)
        if failed and lost is not None:
            # Actors die with it, and a call that waited for it fails in whatever way.
            raise lost from error

    # --- Start ----------------------------------------------------------------------------------

    def preload_imports(self) -> None:
        """Let one process make the imports for all (`actors.cluster.fast_start`), where all processes of the
        run are to be on this machine and its CPUs. Elsewhere each process makes its own."""
        specs = self._specs(self._likely())
        self._imports_apart = self._why_apart(specs)
        if self._imports_apart is None:
            env = actor_environment(specs[POLICY].threads, one_node=True)
            self._fork_server = ForkServer(HOST_MODULES, env, self.directory.logs / "fork-server.log")

    def _why_apart(self, specs: Mapping[str, RoleSpec]) -> str | None:
        """Why each process has to make its own imports; None: one can make them for all."""
        if not self.local:
            return "they run on a cluster"
        if not self.config.ray.fast_start:
            return "ray.fast_start is false"
        if POLICY not in specs:
            return "none of them trains"
        if (
            len({spec.threads for spec in specs.values()}) > 1
        ):  # Read when torch is loaded, so the same in all.
            return "roles have different threads"
        return "a role has GPUs" if any(spec.gpus for spec in specs.values()) else None

    def machine_problems(self) -> list[str]:
        """Resources that the roles which will work ask for and this machine lacks, where the run is local."""
        return machine_problems(self.config, self._likely())

    def prestart(self) -> None:
        """On a local cluster: let Ray and the first processes' imports begin while the driver reads on."""
        roles = self._likely()
        if not roles or not self.local:
            return
        first = [name for name in roles if name in self._first(roles)]
        self._starting = self._thread.submit(self._start_ray, first)
        if POLICY in first:
            self._facts = self._thread.submit(self._ask_facts, self._starting)

    def base_facts(self) -> Callable[[], BaseFacts]:
        """Waits for what there is to know of the run's base: from a rank, which imports torch anyway, so that
        this process needn't; from this process where no rank has been started."""
        asked = self._facts
        return (lambda: base_facts(self.config.model)) if asked is None else (lambda: asked.result().result())

    def _ask_facts(self, starting: Future[None]) -> WorkerFuture[BaseFacts]:
        starting.result()  # What kept Ray from starting is the failure to tell.
        target = f"{base_facts.__module__}:{base_facts.__name__}"
        return self._group(POLICY).submit_work(0, target, self.config.model, phase="start")

    def start(self, graph: Graph) -> None:
        """The processes of the first stage; only Ray itself is waited for. The others: `start_others`.

        Raises:
            UserError: the cluster has less than the roles ask for; nothing was started on it.
        """
        began = time.monotonic()
        starting, self._starting = self._starting, None
        phase("starting Ray")
        if starting is not None:
            starting.result()
        roles = self._needed(graph)
        self._later = [name for name in roles if name not in self._first(roles)]
        if roles:
            # In its thread always: in the main one Ray would take SIGTERM for itself.
            self._thread.submit(self._start_ray, []).result()
            check_cluster(self._specs(roles))
            for name in by_size(self._specs(roles)):
                self._made(name).reserve()
            self._start_ray(self._first(roles))
        for name in set(self._groups) - set(roles):
            self._groups.pop(name).shutdown()
        self.startup["wait for ray"] = round(time.monotonic() - began, 2)
        if graph.pending:
            first = graph.pending[0]
            for name in [name for name in (REFERENCE, POLICY) if name in self._first(roles)]:
                self._host(name, first, first.start)
            for name in roles_of(first.spec) & set(ENGINE_ROLES):
                self._build_engines(name)

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
        import_ray()
        if self._left:  # A run that ends meanwhile starts nothing.
            return
        if not self._ray:
            spec = self.config.ray
            self._ray = True
            cluster = start_ray(
                spec.address,
                num_cpus=spec.num_cpus,
                object_store_memory=spec.object_store_memory,
                fast_start=spec.fast_start,
                fork_server=self._fork_server,
                keep_logs=self.directory.logs / "ray",
            )
            self.ray_line = cluster.how
            if spec.fast_start and self._imports_apart is not None:
                self.ray_line += f"; processes make their own imports: {self._imports_apart}"
        # An engine has most to import: its process comes first, unless it is in another one's bundle.
        for name in sorted(roles, key=lambda name: ROLES[name].holds != "engine"):
            self._group(name)

    def _specs(self, roles: list[str]) -> dict[str, RoleSpec]:
        return {name: self.config.roles.of(name) for name in roles}

    def _likely(self) -> list[str]:
        """Roles that work on what has no finished result in the run directory."""
        path = self.directory.path
        open_stages = [s for name, s in self.config.stages.items() if not (path / name / MANIFEST).is_file()]
        wanted = {role for stage in open_stages for role in roles_of(stage)}
        unfinished = any(not (path / "eval" / f"{m}.json").is_file() for m in self.config.eval_models())
        if unfinished or self.config.model.allow_untested:
            wanted |= evaluation_roles()
        return self.config.roles.with_processes(wanted)

    def _needed(self, graph: Graph) -> list[str]:
        cache = self.directory.path.parent / ".cache" / "reference"
        self.feeds = {
            node.name: make_feed(node.prepared, node.reference, cache, self.fresh)
            for node in graph.pending
            if not node.prepared.online and node.reference is not None
        }
        kept = {name for name, feed in self.feeds.items() if feed.cached}
        wanted: set[str] = set()
        for node in graph.pending:
            wanted |= roles_of(node.spec) - ({REFERENCE} if node.name in kept else set())
        if graph.evaluations_pending or (graph.untested and graph.pending):
            wanted |= evaluation_roles()
        if not all(pairs.done for pairs in graph.pair_evaluations):
            wanted.add(POLICY)
        return self.config.roles.with_processes(wanted)

    def _group(self, name: str) -> WorkerGroup:
        group = self._made(name)
        return group if group.started else group.start()

    def _made(self, name: str) -> WorkerGroup:
        """A role's group, whose processes were perhaps not started yet."""
        if name not in self._groups:
            group: WorkerGroup
            roles, limits, logs = self.config.roles, self.config.limits, self.directory.logs
            role, env = roles.of(name), passed_on(self.config.ray.env)
            if name in ENGINE_ROLES:
                beside = self._made(roles.host_of(name)) if roles.alternates(name) else None
                group = rollout_group(role, limits, logs, name, env, beside, self._supervision)
            else:
                guests = any(roles.alternates(one) and roles.host_of(one) == name for one in ROLES)
                group = host_group(name, role, limits, logs, env, guests, self._supervision)
            group.measured, group.note = self.measured, self._note
            self._groups[name] = group
        return self._groups[name]

    def _host(self, name: str, node: Node, weights: Weights) -> Host:
        """The role's host with the base of `weights`, kept from the stage before where it fits."""
        role = self.config.roles.of(name)
        spec = host_spec(self.config, node, weights, role)
        host = self._hosts.get(name)
        if host is not None and fits(host, spec, weights):
            return host
        workers = ModelWorkers(self._group(name))
        if name == POLICY:
            self.turns.to_policy()
        building = workers.build(spec.model_copy(update={"device": "cuda" if role.gpus > 0 else "cpu"}))
        host = self._hosts[name] = Host(workers, spec, weights, building)
        if name == POLICY:
            self.turns.policy_built()
        return host

    @contextlib.contextmanager
    def measuring(self, note: Callable[[str], None]) -> Iterator[None]:
        """A stage, whose first calls give the deadlines of the later ones that the user hasn't set; a line to
        `note` for each."""
        self._measure(MeasuredLimits(self.config.limits, note))
        try:
            yield
        finally:
            self._measure(None)

    def _measure(self, measured: MeasuredLimits | None) -> None:
        self.measured = measured
        for group in self._groups.values():
            group.measured = measured

    def release(self) -> None:
        """End the training hosts (`keep_warm: false`), and engines in their bundles; the next stage starts
        new ones."""
        guests = [name for name in self._groups if self.config.roles.alternates(name)]
        for name in [*guests, *self._hosts]:
            self._groups.pop(name).shutdown()
            self._engines.pop(name, None)
        self._hosts.clear()
        self.turns.gone()

    def ready_host(self, name: str, node: Node, weights: Weights) -> Host:
        """The role's host, loaded and set to this stage's batching; its wait is part of the start-up."""
        phase(f"starting the processes of {name}, which load the base")
        if name == POLICY:
            self.turns.to_policy()
        host = self._host(name, node, weights)
        began = time.monotonic()
        host.ready()
        self.startup.setdefault(f"wait for {name}", round(time.monotonic() - began, 2))
        spec = node.spec
        host.workers.set_batching(spec.packing, spec.max_tokens_per_micro_batch)
        return host

    def engines(self, role: str = ROLLOUT) -> WorkerGroup:
        """The engines of a role, ready to load a model; it is their turn, where they take any."""
        group = self.engine_processes(role)
        if self.config.roles.alternates(role):
            self.turns.to_engines()
        return group

    def engine_processes(self, role: str = ROLLOUT) -> WorkerGroup:
        """The processes of a role's engines, whoever's turn it is."""
        began = time.monotonic()
        building = self._build_engines(role)
        if building is not None:
            phase(f"starting the engines of {role}")
            bring_up(self._group(role), building)
            self.startup.setdefault(f"wait for {role}", round(time.monotonic() - began, 2))
            self._engines[role] = None
        return self._group(role)

    def policy_workers(self) -> WorkerGroup | None:
        """The policy's ranks, once their base is loaded; None where none was asked for."""
        host = self._hosts.get(POLICY)
        if host is None:
            return None
        host.ready()
        return host.workers.group

    def built_engines(self) -> WorkerGroup | None:
        """The engines that take turns with the policy, once their processes have one each; None: there are
        none yet."""
        return self.engine_processes() if ROLLOUT in self._engines else None

    def _build_engines(self, role: str) -> GroupFuture[float] | None:
        """Let the actors of a role's engines be made, unless they were; None when that is done."""
        if role not in self._engines:
            self._engines[role] = self._group(role).build(ENGINE, self.engine_spec(role))
        return self._engines[role]

    def engine_spec(self, role: str = ROLLOUT) -> EngineSpec:
        """Settings of every engine of a role."""
        return EngineSpec(
            dtype=self.config.model.dtype,
            trust_remote_code=self.config.model.trust_remote_code,
            quantization=self.config.model.quantization if role == ROLLOUT else None,  # A judge has its own.
            enable_sleep_mode=self.config.roles.alternates(role),
            enable_return_routed_experts=role == ROLLOUT and self.config.model.moe.router_replay == "rollout",
            **self.config.roles.engine_of(role).model_dump(),
        )


def _block_hangup() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

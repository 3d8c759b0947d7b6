"""The processes of one role: placed, started in parallel, called with deadlines, ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.batches.batch import Batch
from actors.cluster import futures as waiting
from actors.cluster.agreement import agreed
from actors.cluster.arrival import Arrivals
from actors.cluster.connection import on_one_machine
from actors.cluster.environment import actor_environment
from actors.cluster.futures import AgreedFuture, GroupFuture, WorkerFuture
from actors.cluster.health import Members, ProcessEvent, ProcessState
from actors.cluster.liveness import Liveness
from actors.cluster.measured_limits import MeasuredLimits
from actors.cluster.patient_clock import patient
from actors.cluster.placement import Places
from actors.cluster.spec import LimitsSpec, Phase, RoleSpec
from actors.cluster.supervision import Supervision
from actors.cluster.worker import Worker
from actors.errors import AGAIN, RunFailure

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

Finish = Callable[["dict[int, ObjectRef]", Phase, "float | None"], list[Any]]
"""finish(refs, phase, since): values of a call that was sent, as `Liveness.finish` waits for them."""

ASIDE = "aside"
"""Ray's name of the thread of a process for calls beside the others, which stay on its main thread."""


@dataclass(frozen=True)
class Making:
    """Arguments of the last `WorkerGroup.build`, to make the same again."""

    target: str
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    phase: Phase
    distributed: bool


class WorkerGroup:
    """N processes of a role, each with one object of the same class.

    `start` and `submit` return at once; `ready` and `result` wait, each under the deadline of its phase.
    After a death or an overrun the group is broken: every further call fails at once with the same reason.
    """

    def __init__(
        self,
        name: str,
        role: RoleSpec,
        limits: LimitsSpec,
        log_dir: str | Path,
        *,
        preload: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        next_step: str = AGAIN,
        beside: WorkerGroup | None = None,
        has_guests: bool = False,
        supervision: Supervision | None = None,
    ) -> None:
        """`name` is the role, as it appears in errors and log files; `preload`: modules to import early;
        `env`: variables on top of `actor_environment`; `beside`: a group, started before, with whose
        processes these take turns, rank i in the bundle and on the GPU of its rank i; `has_guests`: another
        group is `beside` this one; `supervision`: of the run, which bounds what is replaced; None: one of its
        own."""
        self.name, self.role, self.limits = name, role, limits
        self.log_dir = Path(log_dir).absolute()
        self.size = role.workers
        self.next_step = next_step
        host = None if beside is None else beside._places
        self._places: Places = Places(role, host, has_guests=has_guests)
        self.liveness = Liveness(
            name, self.size, limits, self.log_dir, next_step, lambda: self._actors, self._places.unplaced
        )
        self.supervision = supervision or Supervision.of(limits)
        self._preload = tuple(preload)
        self._env = dict(env or {})
        self.note: Callable[[str], None] = lambda line: None
        """Says a line to the user."""
        self._actors: list[ActorHandle] = []
        self._asked_on: dict[int, str | None] = {}
        """Node that a restarted process was asked for on; None: there was no room for it."""
        self._made: Making | None = None
        self._order = threading.Lock()

    # --- Start and end ------------------------------------------------------------------------------

    def reserve(self) -> WorkerGroup:
        """Ask Ray for room on its nodes alone; returns at once."""
        self._places.reserve()
        return self

    def start(self) -> WorkerGroup:
        """Ask Ray for the processes; returns at once."""
        self.reserve()
        self._actors = [self._start_rank(rank) for rank in range(self.size)]
        return self

    def ready(self) -> WorkerGroup:
        """Wait until every process is up (its imports may still run).

        Raises:
            RunFailure: a process died, or was not up (or not placed) within `limits.start`.
        """
        self.liveness.finish({rank: actor.ping.remote() for rank, actor in enumerate(self._actors)}, "start")
        return self

    def build(
        self, target: str, *args: object, distributed: bool = False, phase: Phase = "load", **kwargs: object
    ) -> GroupFuture[float]:
        """Make the object (`module:Class`) on every rank, in place of an earlier one; returns at once.

        `distributed`: the class also gets rank, world_size, init_method and timeout_s, to join its peers.
        The value of each rank is the seconds that it took.
        """
        limit = self.limits.of(phase)
        actors = self._checked(range(self.size), phase)
        where = actors[0].rendezvous.remote(on_one_machine()) if distributed and self.size > 1 else None
        self._made = Making(target, args, kwargs, phase, distributed)
        refs = {}
        for rank, actor in enumerate(actors):
            own = dict(kwargs)
            if distributed:
                own |= {"rank": rank, "world_size": self.size, "timeout_s": self.limits.of("update")}
            refs[rank] = actor.build.remote(target, phase, limit, where, args, own)
        return GroupFuture(refs, phase, self.liveness.finish)

    def rebuild(self, rank: int) -> float:
        """Wait for a restarted process and make in it what the last `build` made; seconds of the making.

        Raises:
            ValueError: nothing was built, or something distributed, whose ranks meet when they are built.
            RunFailure: as `arrive` and `GroupFuture.result`.
        """
        made = self._made
        if made is None or made.distributed:
            raise ValueError(f"{self.name} has nothing that one process alone could make again")
        self.arrive([rank])
        (actor,) = self._checked([rank], made.phase)
        limit = self.limits.of(made.phase)
        building = actor.build.remote(made.target, made.phase, limit, None, made.args, dict(made.kwargs))
        (seconds,) = self.liveness.finish({rank: building}, made.phase)
        return float(seconds)

    def shutdown(self, *, kindly: bool = True) -> None:
        """End the processes: kindly within `limits.stop`, then by force. Never raises."""
        import ray

        if not self._places.reserved or not ray.is_initialized():
            return
        try:
            self._end(range(len(self._actors)), kindly=kindly)
        finally:
            self._places.give_back()
            self._actors = []

    def resize(self, size: int) -> list[int]:
        """Have `size` processes: end the last ones kindly, or ask for new ones behind them, which have to
        `arrive` and to be built; returns the ranks of these at once.

        Raises:
            NoRoom: the cluster has no room for them; nothing was asked for.
        """
        had = self.size
        if size < had:
            self._end(range(size, had))
        self._places.resize(size)
        del self._actors[size:]
        for rank in range(size, had):
            self._asked_on.pop(rank, None)
        self.size = size
        self.liveness.resize(size)
        self._actors += [self._start_rank(rank) for rank in range(had, size)]
        return [*range(had, size)]

    def restart(self, rank: int, place: str = "") -> None:
        """Replace a dead or suspect process by a fresh one, which has to `arrive` and to be built again;
        returns at once. `place`: what it was doing, in words that no other moment has.

        Raises:
            ValueError: the process serves, and was never late.
            RunFailure: too many were replaced: the run ends.
        """
        self.fleet.after([rank], ProcessEvent.RESTARTED)  # Is it allowed at all?
        reason = self.fleet.members[rank].reason or "it was late before"
        self.supervision.lost(self.name, self.size, {rank: reason}, place, next_step=self.next_of(rank))
        self.liveness.saw([rank], ProcessEvent.RESTARTED)
        self._start_again(rank)

    def arrive(self, ranks: Iterable[int]) -> None:
        """Wait until processes that were restarted are up: on other nodes, where theirs have died.

        Raises:
            NoRoom: a node died, and what was on it had no room elsewhere within `limits.room`.
            RunFailure: a process died, or was not up within `limits.start`.
        """
        wanted = [*ranks]
        self._checked(wanted, "start")
        arrivals = Arrivals(
            self.liveness,
            self._places,
            ping=lambda rank: self._actors[rank].ping.remote(),
            start=self._start_again,
            note=self.note,
        )
        node_of = self._places.node_of
        asked_on = {r: self._asked_on[r] if r in self._asked_on else node_of(r) for r in wanted}
        arrivals.wait(asked_on)

    def end(self, rank: int) -> None:
        """Kill the process of a rank that stands still, so that those who wait for it are told; it has to be
        restarted."""
        import ray

        ray.kill(self._actors[rank])

    # --- Calls --------------------------------------------------------------------------------------

    def submit(self, method: str, *args: object, phase: Phase = "call", **kwargs: object) -> GroupFuture[Any]:
        """Call a method on every rank with the same arguments; large ones go to the object store once.

        Untyped: a room that has a remote object has a face of it, whose methods say each call's types.
        """
        refs, finish = self._call(range(self.size), method, args, phase, kwargs)
        return GroupFuture(refs, phase, finish)

    def submit_alike(
        self, method: str, *args: object, phase: Phase = "call", own: Sequence[str] = (), **kwargs: object
    ) -> AgreedFuture[Any]:
        """`submit`, of a method whose result is the same on every rank: the first one hands it over, the
        others prove that theirs is the same. `own`: keys of it that may differ.

        Ranks that hold one model together compute the same rows side by side, on GPUs in any order of sums:
        they may differ by rounding.
        """
        alike = own if self.size > 1 else None
        refs, finish = self._call(range(self.size), method, args, phase, kwargs, alike)
        return AgreedFuture(refs, phase, finish)

    def submit_rank(
        self, rank: int, method: str, *args: object, phase: Phase = "call", **kwargs: object
    ) -> WorkerFuture[Any]:
        """Call a method on one rank."""
        refs, finish = self._call([rank], method, args, phase, kwargs)
        return WorkerFuture(refs, phase, finish)

    def submit_work(self, rank: int, target: str, *args: object, phase: Phase = "call") -> WorkerFuture[Any]:
        """Call a function (`module:function`) in the process of one rank, once its `preload`ed modules are
        imported; nothing has to be built there."""
        (actor,) = self._checked([rank], phase)
        refs = {rank: actor.work.remote(target, phase, self.limits.of(phase), args)}
        return WorkerFuture(refs, phase, self.liveness.finish)

    def call(self, method: str, *args: object, phase: Phase = "call", **kwargs: object) -> list[Any]:
        """`submit` and wait: the value of each rank. Raises as `GroupFuture.result`."""
        return self.submit(method, *args, phase=phase, **kwargs).result()

    def call_alike(
        self, method: str, *args: object, phase: Phase = "call", own: Sequence[str] = (), **kwargs: object
    ) -> Any:
        """`submit_alike` and wait. Raises as `AgreedFuture.result`."""
        return self.submit_alike(method, *args, phase=phase, own=own, **kwargs).result()

    def call_rank(
        self, rank: int, method: str, *args: object, phase: Phase = "call", **kwargs: object
    ) -> Any:
        """`submit_rank` and wait: that rank's value. Raises as `GroupFuture.result`."""
        return self.submit_rank(rank, method, *args, phase=phase, **kwargs).result()

    def call_aside(self, rank: int, method: str, *args: object, phase: Phase = "call") -> Any:
        """`call_rank`, of a method that may work beside the one that the rank is busy with."""
        (actor,) = self._checked([rank], phase)
        asked = actor.call_aside.options(concurrency_group=ASIDE).remote(method, phase, args)
        (value,) = self.liveness.finish({rank: asked}, phase)
        return value

    def overrun(self, rank: int, phase: Phase, seconds: float) -> RunFailure:
        """Take a rank for suspect whose caller, with a deadline of its own, had no answer for `seconds`."""
        return self.liveness.overdue([rank], phase, seconds)

    def lost(self, calls: Iterable[int], since: float, phase: Phase) -> dict[int, RunFailure]:
        """Of ranks that were called at `since` (`patient()`), those that stand still, which are suspect from
        now on."""
        present = {rank: self.fleet.members[rank].generation for rank in calls}
        found = self.liveness.lookout.lost(present, patient() - since)
        return {rank: self.liveness.given_up({rank: why}, phase, present) for rank, why in found.items()}

    def look_after(self, ranks: Iterable[int]) -> None:
        """See which of these processes, which have nothing to do, still answer: others are suspect or dead
        after that. Never raises."""
        asked = {rank: self._actors[rank].ping.remote() for rank in ranks if self.fleet.serves(rank)}
        began = patient()
        for rank, ref in asked.items():
            with contextlib.suppress(RunFailure):
                self.liveness.finisher({rank: ref}, "ping")({rank: ref}, "call", began)

    def pids(self) -> list[int]:
        """Process id of each rank, on its own node."""
        asked = {rank: actor.ping.remote() for rank, actor in enumerate(self._actors)}
        return [answer["pid"] for answer in self.liveness.finish(asked, "call")]

    # --- What is known of the processes -------------------------------------------------------------

    @property
    def lives(self) -> int:
        """Times that all processes were replaced, and what they held with them."""
        return 0

    @property
    def started(self) -> bool:
        """Ray was asked for the processes, and they were not shut down."""
        return bool(self._actors)

    @property
    def fleet(self) -> Members:
        """State of each process."""
        return self.liveness.fleet

    @property
    def measured(self) -> MeasuredLimits | None:
        """Deadlines of the stage that these processes work in; None: `limits` hold."""
        return self.liveness.measured

    @measured.setter
    def measured(self, measured: MeasuredLimits | None) -> None:
        self.liveness.measured = measured

    def limit(self, phase: Phase, method: str) -> float:
        """Deadline of a call in seconds."""
        return self.liveness.limit(phase, method)

    def who(self, rank: int) -> str:
        """Name of a rank in errors and log files."""
        return self.liveness.who(rank)

    def next_of(self, rank: int) -> str:
        """Advice after a failure of this rank, with its log."""
        return self.liveness.next_of(rank)

    # --- Inside -------------------------------------------------------------------------------------

    def _end(self, ranks: Iterable[int], *, kindly: bool = True) -> None:
        """End processes: kindly within `limits.stop`, then by force."""
        import ray

        states = (ProcessState.STARTING, ProcessState.HEALTHY)
        ending = [*ranks]
        alive = [rank for rank in ending if kindly and self.fleet.members[rank].state in states]
        try:
            with contextlib.suppress(RunFailure):  # Ray is lost: they end with it.
                waiting.wait({r: self._actors[r].stop.remote() for r in alive}, self.limits.of("stop"))
        finally:
            for rank in ending:
                ray.kill(self._actors[rank])

    def _start_again(self, rank: int) -> str | None:
        """End the process of a rank, and ask for another one: on which node, None where there is no room."""
        import ray

        ray.kill(self._actors[rank])
        node = self._asked_on[rank] = self._places.node_of(rank)
        if node is not None:
            self._actors[rank] = self._start_rank(rank)
        return node

    def _start_rank(self, rank: int) -> ActorHandle:
        import ray

        wanted = self._places.asked()
        options = {
            "num_cpus": wanted.pop("CPU", 0),
            "num_gpus": wanted.pop("GPU", 0),
            "resources": wanted,
            "max_restarts": 0,
            "scheduling_strategy": self._places.strategy(rank),
        }
        env = actor_environment(self.role.threads, one_node=on_one_machine()) | self._env
        actor = (
            ray.remote(concurrency_groups={ASIDE: 1})(Worker)
            .options(**options)
            .remote(self.who(rank), str(self.liveness.log(rank)), env, self._preload)
        )
        self.liveness.lookout.expect(rank, actor.ping.remote())
        return actor

    def _call(
        self,
        ranks: Sequence[int] | range,
        method: str,
        args: tuple[object, ...],
        phase: Phase,
        kwargs: Mapping[str, object],
        alike: Sequence[str] | None = None,
    ) -> tuple[dict[int, ObjectRef], Finish]:
        """Send a call, and say what waits for it. `alike`: as of `_send`."""
        refs = self._send(ranks, method, args, phase, kwargs, alike)
        finish = self.liveness.finisher(refs, method)
        if alike is None:
            return refs, finish
        who = [self.who(rank) for rank in refs]
        return refs, lambda *sent: [agreed(finish(*sent), who, method)]

    def _send(
        self,
        ranks: Sequence[int] | range,
        method: str,
        args: Sequence[object],
        phase: Phase,
        kwargs: Mapping[str, object],
        alike: Sequence[str] | None = None,
    ) -> dict[int, ObjectRef]:
        """`alike`: only the first rank's value is wanted, and the keys in which ranks may differ."""
        chosen = self._checked(ranks, phase)
        shared = [once(arg) if len(chosen) > 1 else arg for arg in args]
        asked = method, phase, self.liveness.limit(phase, method), dict(kwargs)
        exact = self.role.tensor_parallel_size == 1
        # Two threads' calls must reach all ranks in the same order: ranks meet inside of them.
        with self._order:
            if alike is None:
                return {rank: actor.call.remote(asked, *shared) for rank, actor in zip(ranks, chosen)}
            return {
                rank: actor.call_alike.remote(asked, alike, exact, rank == ranks[0], *shared)
                for rank, actor in zip(ranks, chosen)
            }

    def _checked(self, ranks: Sequence[int] | range, phase: str) -> list[ActorHandle]:
        if not self._actors:
            raise RunFailure(self.name, phase, "its processes were not started, or are shut down")
        self.liveness.check(ranks, phase)
        return [self._actors[rank] for rank in ranks]


def once(value: object) -> object:
    """Put a large argument in the object store, for all ranks of the call."""
    import ray

    return ray.put(value) if isinstance(value, Batch | np.ndarray) else value

"""The processes of one role: placed, started in parallel, replaced by fresh ones, ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from actors.cluster import futures as waiting
from actors.cluster.arrival import Arrivals
from actors.cluster.connection import on_one_machine
from actors.cluster.environment import actor_environment
from actors.cluster.health import Members, ProcessEvent, ProcessState
from actors.cluster.liveness import Liveness
from actors.cluster.patient_clock import patient
from actors.cluster.placement import Places
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.supervision import Supervision
from actors.cluster.worker import Worker
from actors.errors import AGAIN, RunFailure

if TYPE_CHECKING:
    from ray.actor import ActorHandle

ASIDE = "aside"
"""Ray's name of the thread of a process for calls beside the others, which stay on its main thread."""


class Processes:
    """N processes of a role, by rank.

    `start` and `restart` return at once; `ready` and `arrive` wait.
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
        beside: Processes | None = None,
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
        self._order = threading.Lock()
        """Held while all processes are asked for something: ranks meet inside of
        calls, so that those of two threads have to reach them in one order."""

    def reserve(self) -> Self:
        """Ask Ray for room on its nodes alone; returns at once."""
        self._places.reserve()
        return self

    def start(self) -> Self:
        """Ask Ray for the processes; returns at once."""
        self.reserve()
        self._actors = [self._start_rank(rank) for rank in range(self.size)]
        return self

    def ready(self) -> Self:
        """Wait until every process is up (its imports may still run).

        Raises:
            RunFailure: a process died, or was not up (or not placed) within `limits.start`.
        """
        self.liveness.finish({rank: actor.ping.remote() for rank, actor in enumerate(self._actors)}, "start")
        return self

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

    def restart(self, rank: int, place: str = "", reason: str = "") -> None:
        """Replace a dead or suspect process by a fresh one, which has to `arrive` and to be built again;
        returns at once. `place`: what it was doing, in words that no other moment has; `reason`: what its
        caller knows of its loss.

        Raises:
            ValueError: the process serves, and was never late.
            RunFailure: too many were replaced: the run ends.
        """
        self.fleet.after([rank], ProcessEvent.RESTARTED)  # Is it allowed at all?
        reason = reason or self.fleet.members[rank].reason or "it was late before"
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

    # --- What is known of them ---------------------------------------------------------------------

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

    @property
    def started(self) -> bool:
        """Ray was asked for the processes, and they were not shut down."""
        return bool(self._actors)

    @property
    def fleet(self) -> Members:
        """State of each process."""
        return self.liveness.fleet

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

    def _checked(self, ranks: Sequence[int] | range, phase: str) -> list[ActorHandle]:
        if not self._actors:
            raise RunFailure(self.name, phase, "its processes were not started, or are shut down")
        self.liveness.check(ranks, phase)
        return [self._actors[rank] for rank in ranks]

"""The processes of one role, each with an object, whose methods are called under deadlines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.batches.batch import Batch
from actors.cluster.agreement import agreed
from actors.cluster.connection import on_one_machine
from actors.cluster.futures import AgreedFuture, GroupFuture, WorkerFuture
from actors.cluster.measured_limits import MeasuredLimits
from actors.cluster.patient_clock import patient
from actors.cluster.processes import ASIDE, Processes
from actors.cluster.spec import Phase
from actors.errors import RunFailure

if TYPE_CHECKING:
    from ray import ObjectRef

Finish = Callable[["dict[int, ObjectRef]", Phase, "float | None"], list[Any]]
"""finish(refs, phase, since): values of a call that was sent, as `Liveness.finish` waits for them."""


@dataclass(frozen=True)
class Making:
    """Arguments of the last `WorkerGroup.build`, to make the same again."""

    target: str
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    phase: Phase
    distributed: bool


class WorkerGroup(Processes):
    """N processes of a role, each with one object of the same class.

    `submit` returns at once; `result` waits under the deadline of its phase.
    After a death or an overrun the group is broken: every further call fails at once with the same reason.
    """

    _made: Making | None = None

    # --- Its object -------------------------------------------------------------------------------

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
        found = self.liveness.standing_still([*present], patient() - since)
        return {rank: self.liveness.given_up({rank: why}, phase, present) for rank, why in found.items()}

    # --- What is known of the processes -------------------------------------------------------------

    @property
    def lives(self) -> int:
        """Times that all processes were replaced, and what they held with them."""
        return 0

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

    # --- Inside -------------------------------------------------------------------------------------

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
        with self._order:
            if alike is None:
                return {rank: actor.call.remote(asked, *shared) for rank, actor in zip(ranks, chosen)}
            return {
                rank: actor.call_alike.remote(asked, alike, exact, rank == ranks[0], *shared)
                for rank, actor in zip(ranks, chosen)
            }


def once(value: object) -> object:
    """Put a large argument in the object store, for all ranks of the call."""
    import ray

    return ray.put(value) if isinstance(value, Batch | np.ndarray) else value

"""A group of ranks that outlives its processes: one that is lost is replaced, and what was built and done in
it is done again.

The state of a rank is a function of the calls that it was given, in their order. So the driver keeps

- calls that make something (`Habits.makes`), since the object was built;
- a snapshot of what the ranks hold, from the ranks that hold it. It is a result of a call, so it is the
  driver's and lies in the object store: it outlives the process that it came from;
- calls that change values (`Habits.changes`) since that snapshot.

After a loss all ranks get fresh processes, which build the object, make what was made, take the snapshot over
and make the calls since. Then every call that somebody still waits for is made again, and whoever waits gets
its answer a little later. The answers are those of an undisturbed run, bit for bit, as far as the calls are
functions of the state and their arguments.

Calls of a session (`Habits.sessions`), which mean something to the processes of the moment alone, are not
made again: whoever made them gets `RanksReplaced`, and begins anew.

What may be replaced, and when a run ends, is the supervisor's to say.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.cluster.connection import on_one_machine
from actors.cluster.futures import GroupFuture, WorkerFuture, refuse_lost_ray
from actors.cluster.health import ProcessEvent, ProcessState
from actors.cluster.snapshots import Keepers, Snapshot, Snapshots
from actors.cluster.spec import Phase, RoleSpec
from actors.cluster.worker_group import Finish, WorkerGroup, once
from actors.errors import NoRoom, RunFailure

if TYPE_CHECKING:
    from ray import ObjectRef


class RanksReplaced(RunFailure):
    """The processes of a group were replaced while they were asked for something that is not asked again."""


@dataclass(frozen=True)
class Habits:
    """Effects of calls on the state of a rank; a call that is named nowhere here leaves it as it is."""

    makes: frozenset[str] = frozenset()
    """Methods that make something, which later calls use or change."""
    changes: frozenset[str] = frozenset()
    """Methods that change values. One that also `makes` reads what may be gone later: it is not made again
    once a snapshot was taken."""
    publishes: frozenset[str] = frozenset()
    """Methods whose effect is of the values at that moment, and may be asked for until the next one: the last
    is made again with these values."""
    sessions: frozenset[str] = frozenset()
    """Methods that mean something to the present processes alone."""
    snapshot: str = ""
    """snapshot(whole) -> (facts with `kept`, `seconds` and `nbytes`, state)."""
    restore: str = ""
    """restore(*states)."""
    place: Callable[[str, Sequence[object]], str] = lambda method, args: method
    """Words for what a call does ("update of step 12")."""
    parts: Callable[[RoleSpec], bool] = lambda role: False
    """True where each rank of a role holds a part of its own; else all hold the same."""


@dataclass(eq=False)
class Sent:
    """A call of a rank or of all ranks, as it can be made again."""

    number: int
    ranks: Sequence[int] | range
    method: str
    args: tuple[object, ...]
    phase: Phase
    kwargs: Mapping[str, object]
    alike: Sequence[str] | None
    """As of `WorkerGroup._send`."""
    life: int = -1
    """Number of replacements before it was sent last."""
    refs: dict[int, ObjectRef] = field(default_factory=dict)
    finish: Finish | None = None
    answered: bool = False
    """By every rank."""


@dataclass
class Published:
    """The last call of `Habits.publishes`, where a later snapshot has taken its place."""

    snapshot: Snapshot | None
    """Before it, of what steps change; None: the whole one."""
    calls: list[Sent]
    """From the snapshot to it."""


class LastingGroup(WorkerGroup):
    """A `WorkerGroup` whose ranks are replaced. Safe under several threads."""

    habits = Habits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `WorkerGroup`."""
        super().__init__(*args, **kwargs)
        # Held while calls are sent and while ranks are replaced, never while an answer is waited for.
        self._turn = threading.RLock()
        self._life = 0
        """Replacements so far."""
        self._number = 0
        self._makers: list[Sent] = []
        """Calls that made what is in the last whole snapshot."""
        self._since: list[Sent] = []
        """Calls since the last snapshot that made or changed something."""
        self._published: Published | None = None
        self._open: weakref.WeakValueDictionary[int, Sent] = weakref.WeakValueDictionary()
        """Calls that somebody may still wait for."""
        self._snapshots = Snapshots()
        self._built: list[float] = []
        """Seconds of each rank's last building."""
        self._together = True
        """All that there is and will be is one machine."""

    # --- Calls ------------------------------------------------------------------------------------

    @property
    def lives(self) -> int:
        """As `WorkerGroup.lives`."""
        return self._life

    def build(
        self, target: str, *args: object, distributed: bool = False, phase: Phase = "load", **kwargs: object
    ) -> GroupFuture[float]:
        """As `WorkerGroup.build`; ranks that are lost meanwhile are replaced."""
        with self._turn:
            self._made = None
            self._heal(f"start of {self.name}", phase)
            self._makers, self._since, self._snapshots = [], [], Snapshots()
            self._published = None
            self._open.clear()
            building = super().build(target, *args, distributed=distributed, phase=phase, **kwargs)
            life, self._together = self._life, on_one_machine()

        def finish(refs: dict[int, ObjectRef], phase: Phase, since: float | None = None) -> list[Any]:
            try:
                return building.result()
            except RunFailure as failure:
                self._replace(failure, life, f"start of {self.name}")
                return self._built

        return GroupFuture(dict(building._refs), phase, finish)

    def submit_work(self, rank: int, target: str, *args: object, phase: Phase = "call") -> WorkerFuture[Any]:
        """As `WorkerGroup.submit_work`; asked again of the process that takes the place of a lost one."""
        place = f"{target.rpartition(':')[2]} at the start"
        with self._turn:
            self._heal(place, phase)
            asked, life = super().submit_work(rank, target, *args, phase=phase), self._life

        def finish(refs: dict[int, ObjectRef], phase: Phase, since: float | None = None) -> list[Any]:
            try:
                return [asked.result(since)]
            except RunFailure as failure:
                self._replace(failure, life, place)
                return [self.submit_work(rank, target, *args, phase=phase).result()]

        return WorkerFuture(dict(asked._refs), phase, finish)

    def _call(
        self,
        ranks: Sequence[int] | range,
        method: str,
        args: tuple[object, ...],
        phase: Phase,
        kwargs: Mapping[str, object],
        alike: Sequence[str] | None = None,
    ) -> tuple[dict[int, ObjectRef], Finish]:
        habits = self.habits
        with self._turn:
            self._number += 1
            # Large arguments are sent once, however often the call is made.
            shared = tuple(once(arg) for arg in args) if len(ranks) > 1 else args
            sent = Sent(self._number, ranks, method, shared, phase, kwargs, alike)
            self._heal(self._place(sent), phase)
            if method in habits.changes - habits.makes:
                self._keep_before(sent)
            self._send_sent(sent, self._life)
            self._open[sent.number] = sent
            if method in habits.makes | habits.changes | habits.publishes:
                self._since.append(sent)
            if not self._snapshots.suffice:
                # Nothing will be made again, until what is made next is kept: its first step looks.
                self._since = [one for one in self._since if one.method in habits.makes]
            if method in habits.changes - habits.makes:
                earlier = self._snapshots.step
                counts = self._snapshots.follow(self._keepers(), sent.number, self._waits())
                self._forget(counts, earlier)

        def finish(_: dict[int, ObjectRef], phase: Phase, since: float | None = None) -> list[Any]:
            return self._answer(sent, since)

        return sent.refs, finish

    def _answer(self, sent: Sent, since: float | None) -> list[Any]:
        """Values of a call, which is made again as often as ranks are replaced."""
        while True:
            with self._turn:
                refs, life, finish = sent.refs, sent.life, sent.finish
                if self._is_session(sent) and self._life != life:
                    raise RanksReplaced(self.name, sent.phase, "its processes were replaced", self.next_step)
            assert finish is not None
            try:
                values = finish(refs, sent.phase, since)
            except RunFailure as failure:
                self._replace(failure, life, self._place(sent))
                since = None
                continue
            sent.answered = True
            return values

    def _send_sent(self, sent: Sent, life: int) -> None:
        sent.refs, sent.finish = super()._call(
            sent.ranks, sent.method, sent.args, sent.phase, sent.kwargs, sent.alike
        )
        sent.life = life

    def _heal(self, place: str, phase: Phase) -> None:
        """Replace ranks that are known to be lost, before a call."""
        if self._actors and (lost := self._lost()):
            reason = self.fleet.members[lost[0]].reason
            failure = RunFailure(self.who(lost[0]), phase, reason, self.next_of(lost[0]))
            self._replace(failure, self._life, place)

    def _keep_before(self, sent: Sent) -> None:
        """Have a snapshot of everything before the first change to what was made."""
        made = [one for one in self._since if one.method in self.habits.makes]
        if not made:
            return
        while True:
            life = self._life
            try:
                self._snapshots.take_whole(self._keepers(), sent.number - 1)
                break
            except RunFailure as failure:
                self._replace(failure, life, f"snapshot before {self._place(sent)}")
        self._makers += [one for one in made if one.method not in self.habits.changes]
        published = [one for one in self._since if one.method in self.habits.publishes]
        self._published = Published(None, published[-1:]) if published else None
        self._since.clear()

    def _forget(self, number: int | None, earlier: Snapshot | None) -> None:
        """Calls up to this one are in a snapshot, which takes the place of an `earlier` one."""
        if number is None:
            return
        gone = [sent for sent in self._since if sent.number <= number]
        self._since = self._since[len(gone) :]
        published = [n for n, sent in enumerate(gone, 1) if sent.method in self.habits.publishes]
        if published:
            self._published = Published(earlier, gone[: published[-1]])
        elif any(sent.method in self.habits.publishes for sent in self._since):
            self._published = None

    def _waits(self) -> float:
        """Number of the first call that may have to be made again for whoever waits for it."""
        return min((n for n, one in list(self._open.items()) if not self._is_back(one)), default=math.inf)

    def _is_back(self, sent: Sent) -> bool:
        """True where every rank has answered: that lasts, whatever becomes of the ranks."""
        import ray

        if not sent.answered:
            refs = list(sent.refs.values())
            there, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            if len(there) == len(refs):
                with contextlib.suppress(Exception):  # Of the ranks; whoever waits is told.
                    ray.get(refs)
                    sent.answered = True
        return sent.answered

    def _place(self, sent: Sent) -> str:
        """Words that no other call has."""
        return f"{self.habits.place(sent.method, sent.args)} (call {sent.number})"

    def _is_session(self, sent: Sent) -> bool:
        return sent.method in self.habits.sessions

    def _keepers(self) -> Keepers:
        habits = self.habits
        ranks = range(self.size) if self.habits.parts(self.role) else range(1)
        return Keepers(
            ranks, self._actors, self.liveness, habits.snapshot, habits.restore, not self._together
        )

    # --- Ranks that are replaced --------------------------------------------------------------------

    def _lost(self) -> list[int]:
        return self.fleet.ranks(ProcessState.SUSPECT, ProcessState.DEAD)

    def _replace(self, failure: RunFailure, life: int, place: str) -> None:
        """Replace the ranks that were lost, if that was not done since `life`.

        Raises:
            RunFailure: `failure`, where none was lost; or what ends the run.
        """
        with self._turn:
            while self._life == life:
                refuse_lost_ray(now=True)
                # Also one that was late and has answered since: it may hang all the same.
                lost = [rank for rank in range(self.size) if not self.fleet.sound(rank)]
                if not lost or not self._snapshots.suffice:
                    raise failure
                reasons = {rank: self.fleet.members[rank].reason or failure.reason for rank in lost}
                advice = self.next_of(lost[0])
                self.supervision.lost(self.name, self.size, reasons, place, failure.phase, advice)
                try:
                    self._make_again(lost)
                except NoRoom:
                    raise
                except RunFailure as again:
                    failure, place = again, f"{again.phase} of ranks that took the place of others"
                    continue
                self._life += 1
                self.supervision.back(self.name, range(self.size))

    def _make_again(self, lost: Sequence[int]) -> None:
        """Fresh processes in the state after the last call, at work on what somebody waits for."""
        others = [rank for rank in range(self.size) if rank not in lost]
        self.liveness.saw(others, ProcessEvent.DIED, f"ended, as {self.who(lost[0])} was lost")
        self.liveness.saw(range(self.size), ProcessEvent.RESTARTED)
        for rank in range(self.size):
            self._start_again(rank)
        self.arrive(range(self.size))
        made = self._made
        if made is None:
            return
        building = super().build(
            made.target, *made.args, distributed=made.distributed, phase=made.phase, **made.kwargs
        )
        self._built = building.result()
        earlier = self._snapshots.step
        self._forget(self._snapshots.settle(self._keepers(), self._waits()), earlier)
        waiting = [self._again(one) for one in self._makers]
        if self._published is not None:
            waiting += self._snapshots.restore(self._keepers(), self._published.snapshot)
            waiting += [self._again(one) for one in self._published.calls]
        waiting += self._snapshots.restore(self._keepers(), self._snapshots.step)
        open_calls = list(self._open.items())
        wanted = {n: one for n, one in open_calls if not (self._is_session(one) or self._is_back(one))}
        for number, sent in sorted({one.number: one for one in self._since}.items() | wanted.items()):
            if number in wanted:
                self._send_sent(sent, self._life + 1)
            else:
                waiting.append(self._again(sent))
        for wait in waiting:
            wait()

    def _again(self, sent: Sent) -> Callable[[], object]:
        """Make a call whose answer nobody wants; what waits for it."""
        refs, finish = super()._call(sent.ranks, sent.method, sent.args, sent.phase, sent.kwargs, sent.alike)
        return lambda: finish(refs, sent.phase, None)

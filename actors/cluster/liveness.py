"""Liveness of a group's processes: learnt from answers to calls, and from those that don't come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.cluster import futures as waiting
from actors.cluster.health import Members, ProcessEvent, ProcessState
from actors.cluster.lookout import Lookout
from actors.cluster.measured_limits import CUT, MeasuredLimits
from actors.cluster.patient_clock import patient
from actors.cluster.spec import LimitsSpec, Phase
from actors.errors import RunFailure

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle


class Liveness:
    """Waits for answers under deadlines. After a death or an overrun a process is called no more."""

    def __init__(
        self,
        name: str,
        size: int,
        limits: LimitsSpec,
        log_dir: Path,
        next_step: str,
        actors: Callable[[], Sequence[ActorHandle]],
        unplaced: Callable[[], str],
    ) -> None:
        """`actors`: the present processes, by rank; `unplaced`: what they ask for and Ray has not placed, or
        an empty text."""
        self.name, self.limits, self.log_dir, self.next_step = name, limits, log_dir, next_step
        self.fleet = Members.of(size)
        self.lookout = Lookout()
        self.measured: MeasuredLimits | None = None
        """Of the stage that these processes work in; None: `limits` hold."""
        self._actors, self._unplaced = actors, unplaced
        # A process may be brought up in one thread while another one works with the others.
        self._lock = threading.Lock()

    def resize(self, size: int) -> None:
        """Have `size` processes: the last ones are new, or are forgotten."""
        with self._lock:
            self.fleet = self.fleet.resized(size)

    def who(self, rank: int) -> str:
        """Name of a rank in errors and log files."""
        return f"{self.name}-{rank}"

    def next_of(self, rank: int) -> str:
        """Advice after a failure of this rank, with its log."""
        return f"{self.next_step}; log: {self.log(rank)}"

    def log(self, rank: int) -> Path:
        """Log file of a rank."""
        return self.log_dir / f"{self.who(rank)}.log"

    def limit(self, phase: Phase, method: str) -> float:
        """Deadline of a call in seconds."""
        return self.limits.of(phase) if self.measured is None else self.measured.of(self.name, phase, method)

    def check(self, ranks: Iterable[int], phase: str) -> None:
        """Raises: RunFailure: one of these processes is dead or suspect."""
        for rank in ranks:
            member = self.fleet.members[rank]
            if member.state in (ProcessState.SUSPECT, ProcessState.DEAD):
                raise RunFailure(self.who(rank), phase, member.reason, self.next_step)

    def finisher(
        self, refs: Mapping[int, ObjectRef], method: str
    ) -> Callable[[dict[int, ObjectRef], Phase, float | None], list[Any]]:
        """`finish` of calls of the present processes: what becomes of them says nothing of later ones."""
        present = {rank: self.fleet.members[rank].generation for rank in refs}
        sent, measured = time.monotonic(), self.measured

        def finish(refs: dict[int, ObjectRef], phase: Phase, since: float | None = None) -> list[Any]:
            answers = self.finish(refs, phase, since, present, self.limit(phase, method))
            if measured is not None and method not in CUT:
                # From when it was sent: one that waited for others in its process seems longer than it was.
                measured.took(self.name, phase, method, time.monotonic() - sent)
            return answers

        return finish

    def finish(
        self,
        refs: Mapping[int, ObjectRef],
        phase: Phase,
        since: float | None = None,
        generations: Mapping[int, int] | None = None,
        limit: float | None = None,
    ) -> list[Any]:
        """Wait under the deadline of `phase`; values in rank order, or one error with a name.

        `since` (`patient()`): when the deadline began; None: now. `generations`: restarts of each rank when
        it was called; without them, of the processes as they are. `limit`: another deadline than the phase's,
        in seconds. A process that stands still is not waited for that long (`actors.cluster.hung`).
        """
        limit = self.limits.of(phase) if limit is None else limit
        began = patient() if since is None else since
        answers = waiting.wait(
            refs, began + limit - patient(), lambda open_: self.standing_still(open_, patient() - began)
        )
        self.saw(answers.values, ProcessEvent.ANSWERED, generations=generations)
        late = [rank for rank in refs if rank not in answers.values]
        culprit = answers.culprit
        if culprit is not None:
            late = [rank for rank in late if all(fault.rank != rank for fault in answers.faults)]
            if not (late and waiting.waited_in_vain(culprit)):
                raise self._blame(culprit, phase, generations)
            waited = f"{self.who(culprit.rank)} has waited for it in a collective until that timed out"
            raise self.given_up(dict.fromkeys(late, waited), phase, generations)
        if answers.lost:
            raise self.given_up(answers.lost, phase, generations)
        if late:
            raise self.overdue(late, phase, patient() - began, generations)
        return [answers.values[rank] for rank in refs]

    def standing_still(self, ranks: Sequence[int], waited_s: float) -> dict[int, str]:
        """Of ranks that somebody has waited for so long, those that nobody has to wait for any longer, and
        why. One that Ray has not placed is waited for."""
        found, limit = self.lookout.lost(ranks, waited_s), self.limits.start
        silent = self.lookout.silent(ranks, limit)
        if silent and self._unplaced():
            self.lookout.excuse(silent)
            silent = []
        return found | dict.fromkeys(silent, f"no answer within {limit:.0f} s (limits.start)")

    def saw(
        self,
        ranks: Iterable[int],
        event: ProcessEvent,
        reason: str = "",
        generations: Mapping[int, int] | None = None,
    ) -> None:
        """Note what was seen of these processes (in these generations; None: as they are)."""
        with self._lock:
            for rank in ranks:
                self.fleet = self.fleet.after([rank], event, reason, (generations or {}).get(rank))

    def _blame(
        self, fault: waiting.Fault, phase: str, generations: Mapping[int, int] | None = None
    ) -> BaseException:
        rank = self._rank_of(fault)
        if not fault.died:
            return waiting.as_failure(fault.error, self.who(rank), phase, self.next_of(rank))
        waiting.refuse_lost_ray(now=True)
        reason = waiting.explain_death(fault.error)
        self.saw([rank], ProcessEvent.DIED, reason, generations)
        return RunFailure(self.who(rank), phase, reason, self.next_of(rank))

    def overdue(
        self, late: list[int], phase: str, seconds: float, generations: Mapping[int, int] | None = None
    ) -> RunFailure:
        """Take ranks for suspect that have not answered for `seconds`; the error to raise. Where the others
        wait for some of them, these alone."""
        reason = f"no answer within {seconds:.0f} s (limits.{phase})"
        if phase == "start" and (asked := self._unplaced()):
            reason = f"not placed by Ray within {seconds:.0f} s (limits.start): {asked} are not free"
        told = self.lookout.hung(late, seconds)
        reasons = {rank: f"{reason}: {told[rank]}" for rank in late if rank in told}
        return self.given_up(reasons or dict.fromkeys(late, reason), phase, generations)

    def given_up(
        self, reasons: Mapping[int, str], phase: str, generations: Mapping[int, int] | None = None
    ) -> RunFailure:
        """Take ranks for suspect that are waited for no longer, each with the reason; the error to raise."""
        for rank, reason in reasons.items():
            self.saw([rank], ProcessEvent.OVERDUE, reason, generations)
        ranks = [*reasons]
        who = self.who(ranks[0]) if len(ranks) == 1 else f"{self.name} ranks {', '.join(map(str, ranks))}"
        return RunFailure(who, phase, reasons[ranks[0]], self.next_of(ranks[0]))

    def _rank_of(self, fault: waiting.Fault) -> int:
        """The rank that died: not always the one that was asked, if its argument came from the dead one."""
        gone = getattr(fault.error, "actor_id", None)
        for rank, actor in enumerate(self._actors()):
            # Private, and has no public name: without it the rank that was asked is named.
            known = getattr(actor, "_actor_id", None)
            if gone is not None and known is not None and known.hex() == gone:
                return rank
        return fault.rank

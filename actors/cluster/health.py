"""States of a role's processes, as a pure machine: observations in, states out; no Ray, no clock.

    starting -> healthy <-> suspect -> dead -> (restart) -> starting

A process that was seen dead serves nobody until it is restarted: whatever it still says is ignored, so a
late answer of an old process can never pass for one of the new.

One that overran a deadline may answer other calls, even before it was stopped: then it serves, and stays in
doubt, so that whoever replaces what it was late with may restart it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum


class ProcessState(StrEnum):
    """Knowledge about one process."""

    STARTING = "starting"
    """Asked for; has not answered yet."""
    HEALTHY = "healthy"
    """Answered the last time that it was waited for."""
    SUSPECT = "suspect"
    """Overran a deadline; may still be working."""
    DEAD = "dead"
    """Its process is gone."""


class ProcessEvent(StrEnum):
    """Observation of one process."""

    ANSWERED = "answered"
    OVERDUE = "overdue"
    DIED = "died"
    RESTARTED = "restarted"


_NEXT: dict[tuple[ProcessState, ProcessEvent], ProcessState] = {
    (ProcessState.STARTING, ProcessEvent.ANSWERED): ProcessState.HEALTHY,
    (ProcessState.STARTING, ProcessEvent.OVERDUE): ProcessState.SUSPECT,
    (ProcessState.STARTING, ProcessEvent.DIED): ProcessState.DEAD,
    (ProcessState.HEALTHY, ProcessEvent.ANSWERED): ProcessState.HEALTHY,
    (ProcessState.HEALTHY, ProcessEvent.OVERDUE): ProcessState.SUSPECT,
    (ProcessState.HEALTHY, ProcessEvent.DIED): ProcessState.DEAD,
    (ProcessState.SUSPECT, ProcessEvent.ANSWERED): ProcessState.HEALTHY,
    (ProcessState.SUSPECT, ProcessEvent.OVERDUE): ProcessState.SUSPECT,
    (ProcessState.SUSPECT, ProcessEvent.DIED): ProcessState.DEAD,
    (ProcessState.SUSPECT, ProcessEvent.RESTARTED): ProcessState.STARTING,
    (ProcessState.DEAD, ProcessEvent.ANSWERED): ProcessState.DEAD,
    (ProcessState.DEAD, ProcessEvent.OVERDUE): ProcessState.DEAD,
    (ProcessState.DEAD, ProcessEvent.DIED): ProcessState.DEAD,
    (ProcessState.DEAD, ProcessEvent.RESTARTED): ProcessState.STARTING,
}
"""Every allowed transition. Restarting a process that serves is a mistake of the caller, so it is absent: it
is allowed of one in doubt alone."""


@dataclass(frozen=True)
class Member:
    """One process of a role."""

    state: ProcessState = ProcessState.STARTING
    generation: int = 0
    """Restarts so far. An observation made of an earlier generation is ignored."""
    reason: str = ""
    """Why it is suspect or dead."""
    in_doubt: bool = False
    """It overran a deadline since it was started."""

    def after(self, event: ProcessEvent, reason: str = "", generation: int | None = None) -> Member:
        """The member once `event` was seen.

        Raises:
            ValueError: the event can't happen in this state (restarting a member that serves).
        """
        if generation is not None and generation != self.generation:
            return self
        state = _NEXT.get((self.state, event))
        if event is ProcessEvent.RESTARTED and self.in_doubt:
            state = ProcessState.STARTING
        if state is None:
            raise ValueError(f"a {self.state} process can't be {event}: stop it first")
        if event is ProcessEvent.RESTARTED:
            return Member(state, self.generation + 1)
        if state is self.state and state is ProcessState.DEAD:
            return self
        lost = state in (ProcessState.SUSPECT, ProcessState.DEAD)
        in_doubt = self.in_doubt or event is ProcessEvent.OVERDUE
        return replace(self, state=state, reason=reason if lost else "", in_doubt=in_doubt)


@dataclass(frozen=True)
class Members:
    """The processes of one role, by rank."""

    members: tuple[Member, ...] = field(default_factory=tuple)

    @staticmethod
    def of(size: int) -> Members:
        """`size` processes that were just asked for."""
        return Members(tuple(Member() for _ in range(size)))

    def after(
        self, ranks: Iterable[int], event: ProcessEvent, reason: str = "", generation: int | None = None
    ) -> Members:
        """The processes once `event` was seen on `ranks`."""
        after = {rank: self.members[rank].after(event, reason, generation) for rank in ranks}
        if all(after[rank] == self.members[rank] for rank in after):
            return self  # What every answer of a healthy process comes to, however many there are.
        return Members(tuple(after.get(rank, member) for rank, member in enumerate(self.members)))

    def resized(self, size: int) -> Members:
        """The first `size` processes, and new ones behind them where there are fewer."""
        return Members((*self.members[:size], *(Member() for _ in range(size - len(self.members)))))

    def ranks(self, *states: ProcessState) -> list[int]:
        """Ranks that are in one of `states`."""
        return [rank for rank, member in enumerate(self.members) if member.state in states]

    def serves(self, rank: int) -> bool:
        """True if this rank may be asked for work; to ask for each of many costs less than `serving`."""
        return self.members[rank].state in (ProcessState.STARTING, ProcessState.HEALTHY)

    def sound(self, rank: int) -> bool:
        """True if this rank serves and has never been late."""
        return self.serves(rank) and not self.members[rank].in_doubt

    @property
    def serving(self) -> list[int]:
        """Ranks that may be asked for work."""
        return [rank for rank in range(len(self.members)) if self.serves(rank)]

"""Decisions on processes that are lost, of all roles: replace them, or end the run. Pure: observations in,
decisions out; no Ray, no clock, no threads.

    what was lost                                               decision
    ----------------------------------------------------------  ----------------------------------------------
    anything, with `max_restarts` 0                             end: nothing is to be replaced
    a process at a place where `SAME_PLACE` - 1 losses of       end: what is done there kills it (a poisoned
    its role lie within the window                              step), and would again
    a process of a role of which `max_restarts` x its size      end: too many, with the history
    were lost within the window
    anything else                                               replace these ranks

- A place is what the process was doing, in words that no other moment has ("update of step 12"); an empty one
  is not known, and never the same as another.
- Losses that are seen together (a node goes with all that was on it) are one decision, and count one by one.
- Losses older than the window are forgotten.
- A decision to end is kept: whatever is lost after it, nothing is replaced any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

SAME_PLACE = 3
"""Losses of a role at the same place that end a run."""


@dataclass(frozen=True)
class RestartBounds:
    """Bounds on how often processes are replaced."""

    max_restarts: int = 3
    """For each process of a role within `window`, on average: a role of n processes has n times as many."""
    window: float = 3600.0
    """Seconds."""


@dataclass(frozen=True)
class Lost:
    """A process that is gone, or that has to be ended since it doesn't answer."""

    role: str
    rank: int
    place: str
    """Moment of its work; empty: not known."""
    reason: str
    at: float
    """Seconds, by any clock that only grows."""

    def said(self, now: float) -> str:
        """One line of the history."""
        doing = f" ({self.place})" if self.place else ""
        return f"{now - self.at:.0f} s ago {self.role}-{self.rank}{doing}: {self.reason}"


@dataclass(frozen=True)
class Replace:
    """Replace these ranks of a role."""

    role: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class End:
    """End the run."""

    reason: str
    """For the user, with the history."""


Decision = Replace | End


@dataclass(frozen=True)
class Supervisor:
    """Memory of what was lost so far."""

    bounds: RestartBounds = field(default_factory=RestartBounds)
    history: tuple[Lost, ...] = ()
    """Oldest first; what lies outside the window is dropped."""
    ended: End | None = None

    def after(self, losses: Sequence[Lost], size: int) -> tuple[Supervisor, Decision]:
        """The supervisor once these losses of one role, of `size` processes, were seen together; and what to
        do about them.

        Raises:
            ValueError: no losses, or losses of several roles.
        """
        if len({loss.role for loss in losses}) != 1:
            raise ValueError("losses of one role at a time")
        now = max(loss.at for loss in losses)
        kept = tuple(loss for loss in self.history if now - loss.at < self.bounds.window)
        history = (*kept, *losses)
        end = self.ended or self._end(kept, losses, size, now)
        decision: Decision = end or Replace(losses[0].role, tuple(loss.rank for loss in losses))
        return replace(self, history=history, ended=end), decision

    def _end(self, before: Sequence[Lost], losses: Sequence[Lost], size: int, now: float) -> End | None:
        role, last, window = losses[0].role, losses[-1], self.bounds.window
        allowed = self.bounds.max_restarts * size
        if not allowed:
            return End(f"{last.reason} (limits.max_restarts is 0: nothing is replaced)")
        of_role = [loss for loss in before if loss.role == role]
        for place in dict.fromkeys(loss.place for loss in losses if loss.place):
            # Those of one moment have died of the same thing, if of anything: they are one loss here.
            same = {loss.at for loss in of_role if loss.place == place}
            if len(same) + 1 >= SAME_PLACE:
                return End(
                    f"{last.reason}, and that for the {SAME_PLACE}rd time at the same place ({place}): it "
                    f"would again.{_told(of_role, now)}"
                )
        if len(of_role) + len(losses) > allowed:
            times = f"{allowed} times" if allowed > 1 else "once"
            return End(
                f"{last.reason}, after {role} was replaced {times} within {window:g} s "
                f"(limits.max_restarts: {self.bounds.max_restarts}).{_told(of_role, now)}"
            )
        return None


def _told(losses: Sequence[Lost], now: float) -> str:
    return " Before: " + "; ".join(loss.said(now) for loss in losses)

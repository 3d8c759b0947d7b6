"""Tells a process that hangs from those that wait for it: looks in, reasons out; no Ray, no clock, no disk.

    what looks show                                                    what follows
    stopped (SIGSTOP) in all looks for `STOPPED_S`                     lost, before any deadline
    neither CPU time nor a pulse for `FROZEN_S` (a frozen container)   lost, before any deadline
    at a deadline: stopped                                             hung
    at a deadline: others have entered a collective that it has        hung
      not, and it has entered none that others have not
    at a deadline: no pulse for some seconds, while others of those    hung
      that are late have one
    otherwise                                                          all that are late are suspect

One that computes, however long and with the interpreter held, uses CPU time. On a machine that is busy with
other work each process still gets some. So neither is lost before its deadline; and at a deadline one that
has entered a collective in the last seconds is slow, and hangs no more than the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

STOPPED_S = 30.0
"""A process that was stopped for longer is lost. One that a debugger looks at goes on sooner, or is traced,
which is no stop."""
FROZEN_S = 60.0
"""One that got no turn of any CPU for longer is lost; the thread of its pulse alone asks for two a second."""
STILL_S = 5.0
"""At a deadline: one that has entered no collective, or had no pulse, for so long is taken to stand still."""
CONNECTED_S = 30.0
"""Looks that are further apart say nothing of the time between them."""


@dataclass(frozen=True)
class Look:
    """One process, as it is seen from its machine."""

    stopped: bool = False
    """It, or a process that it has started."""
    traced: bool = False
    cpu_s: float = 0.0
    """CPU seconds so far, of it and of what it has started."""
    beats: int = 0
    """Of its pulse so far; 0: none was seen."""
    doing: str = ""
    """Method and step of its call."""
    entered: Mapping[str, int] = field(default_factory=dict)
    """Collectives that it has entered, by the ranks of their group ("0-1")."""


@dataclass(frozen=True)
class Seen:
    """Outcome of all looks at one process; times in seconds of one clock."""

    last: Look
    at: float
    since: float
    """First of the looks that hang together."""
    stopped_since: float | None = None
    still_since: float = 0.0
    """Neither CPU time nor a beat since."""
    behind_since: float = 0.0
    """Entered no collective since."""
    silent_since: float = 0.0
    """No beat since."""

    @staticmethod
    def first(look: Look, at: float) -> Seen:
        """After one look."""
        return Seen(look, at, at, at if look.stopped else None, at, at, at)

    def after(self, look: Look, at: float) -> Seen:
        """After one more."""
        if at - self.at > CONNECTED_S:
            return Seen.first(look, at)
        before = self.last
        still = (look.cpu_s, look.beats) == (before.cpu_s, before.beats) and not look.traced
        since = self.stopped_since if self.stopped_since is not None else at
        return replace(
            self,
            last=look,
            at=at,
            stopped_since=since if look.stopped else None,
            still_since=self.still_since if still else at,
            behind_since=self.behind_since if look.entered == before.entered else at,
            silent_since=self.silent_since if look.beats == before.beats else at,
        )

    def lost(self) -> str | None:
        """The reason why nobody has to wait for it any longer; None: it may still go on."""
        if self.stopped_since is not None and self.at - self.stopped_since >= STOPPED_S:
            return f"its process was stopped (SIGSTOP) for {STOPPED_S:.0f} s"
        if self.last.beats and self.at - self.still_since >= FROZEN_S:
            return f"its process got no CPU time for {FROZEN_S:.0f} s (a container that was frozen?)"
        return None


def hung(seen: Mapping[int, Seen], late: Collection[int], still_s: float = STILL_S) -> dict[int, str]:
    """Of ranks that owe an answer, those for which the others wait, each with the reason; empty: can't tell.

    `seen`: what is known of them; `late`: ranks whose deadline is over; `still_s`: in place of `STILL_S`.
    """
    known = {rank: seen[rank] for rank in late if rank in seen}
    stopped = {rank: "its process is stopped (SIGSTOP)" for rank in known if known[rank].last.stopped}
    if stopped:
        return stopped
    if len(late) == 1 or len(known) < len(late):
        return {}
    if behind := _behind(known, still_s):
        return behind
    silent = [r for r, one in known.items() if one.last.beats and one.at - one.silent_since >= still_s]
    if len(silent) < len(late):
        return dict.fromkeys(silent, "its pulse has stopped: native code holds its interpreter")
    return {}


def _behind(known: Mapping[int, Seen], still_s: float) -> dict[int, str]:
    """Ranks that have not entered a collective in which others wait, and don't wait in another one."""
    most: dict[str, int] = {}
    for one in known.values():
        for group, count in one.last.entered.items():
            most[group] = max(count, most.get(group, 0))
    reasons = {}
    for rank, one in known.items():
        entered = one.last.entered
        missing = [group for group, count in entered.items() if count < most[group]]
        waits = any(
            count > other.last.entered.get(group, count)
            for group, count in entered.items()
            for other in known.values()
        )
        if missing and not waits and one.at - one.behind_since >= still_s:
            reasons[rank] = _waiting(known, missing[0], most[missing[0]])
    return reasons


def _waiting(known: Mapping[int, Seen], group: str, count: int) -> str:
    ahead = [rank for rank, one in known.items() if one.last.entered.get(group) == count]
    doing = known[ahead[0]].last.doing
    others = f"rank {ahead[0]} waits" if len(ahead) == 1 else f"ranks {', '.join(map(str, ahead))} wait"
    return f"{others} for it in collective {count} of ranks {group}" + (f" ({doing})" if doing else "")

"""The supervisor of a run, shared by all its groups of processes: it is told what was lost and what is there
again, ends the run where too much was lost, and tells of each replacement."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from actors.cluster.spec import LimitsSpec
from actors.cluster.supervisor import End, Lost, RestartBounds, Supervisor
from actors.errors import RunFailure


@dataclass(frozen=True)
class Replaced:
    """A process or an engine that was lost, in whose place another one works."""

    role: str
    rank: int
    reason: str
    place: str
    """What is done again; empty: not known."""
    seconds: float
    """From when its loss was seen until the other one held what it has to."""

    def __str__(self) -> str:
        again = f"; {self.place} is done again" if self.place else ""
        who = f"{self.role}-{self.rank}"
        return f"{who} was replaced: {self.reason}{again} ({self.seconds:.1f} s to replace)"


class Supervision:
    """Safe under several threads; all that is decided is in `supervisor`."""

    def __init__(self, bounds: RestartBounds, clock: Callable[[], float] = time.monotonic) -> None:
        self._supervisor, self._clock = Supervisor(bounds), clock
        self._lock = threading.Lock()
        self._away: list[Lost] = []
        """Those in whose place nobody works yet."""
        self.tell: Callable[[str], None] = lambda line: None
        """Says a line to the user."""
        self.replaced: Callable[[Replaced], None] = lambda one: None
        """Hears of each replacement, in the thread that made it."""

    @staticmethod
    def of(limits: LimitsSpec) -> Supervision:
        """A supervisor with the bounds of a run's `limits`."""
        return Supervision(RestartBounds(limits.max_restarts, limits.restart_window))

    @property
    def history(self) -> tuple[Lost, ...]:
        """Losses within the window, oldest first."""
        return self._supervisor.history

    def lost(
        self,
        role: str,
        size: int,
        reasons: Mapping[int, str],
        place: str = "",
        phase: str = "restart",
        next_step: str = "",
    ) -> None:
        """These ranks of a role, of `size` processes, are gone or have to be ended, each for a reason: return
        if they are to be replaced. `place`: what they were doing; empty: not known.

        Raises:
            RunFailure: the run ends, with the history.
        """
        now = self._clock()
        losses = [Lost(role, rank, place, reason, now) for rank, reason in reasons.items()]
        with self._lock:
            self._supervisor, decision = self._supervisor.after(losses, size)
        if isinstance(decision, End):
            who = f"{role}-{losses[-1].rank}"
            raise RunFailure(who, phase, decision.reason, next_step)
        self._begin(losses)

    def remade(self, role: str, rank: int, reason: str) -> None:
        """Note that what a rank held is lost, and will be made anew in its process, or in one that was told
        of as `lost`."""
        with self._lock:
            told = any((one.role, one.rank) == (role, rank) for one in self._away)
        if not told:
            self._begin([Lost(role, rank, "", reason, self._clock())])

    def back(self, role: str, ranks: Iterable[int]) -> None:
        """Note that these ranks hold what they have to; nothing where they were not lost."""
        now, there = self._clock(), {*ranks}
        with self._lock:
            back = [one for one in self._away if one.role == role and one.rank in there]
            self._away = [one for one in self._away if one not in back]
        for one in back:
            replaced = Replaced(one.role, one.rank, one.reason, one.place, now - one.at)
            self.tell(str(replaced))
            self.replaced(replaced)

    def _begin(self, losses: list[Lost]) -> None:
        with self._lock:
            self._away += losses
        for one in losses:
            self.tell(f"{one.role}-{one.rank} was lost: {one.reason}; another takes its place")

"""The supervisor of a run, shared by all its groups of processes: it is told what was lost, and ends the run
where too much was."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from actors.cluster.spec import LimitsSpec
from actors.cluster.supervisor import End, Lost, RestartBounds, Supervisor
from actors.errors import RunFailure


class Supervision:
    """Safe under several threads; all that is decided is in `supervisor`."""

    def __init__(self, bounds: RestartBounds, clock: Callable[[], float] = time.monotonic) -> None:
        self._supervisor, self._clock = Supervisor(bounds), clock
        self._lock = threading.Lock()

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

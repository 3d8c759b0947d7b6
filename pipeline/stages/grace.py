"""Saving within a grace period: a step that would take longer than what is left of it is given up, and what
was there before it is saved.

Schedulers send SIGTERM, and SIGKILL some seconds later: preemption, a node that is drained, a job's time that
is up. Other ways to stop a run have no such end; then a step is finished, however long it takes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from actors.cluster import looking_up
from pipeline.stages.context import GivenUp, Stops

SAVING_S = 8.0
"""Kept for saving and ending, at the least."""
SAVES = 2.0
"""Longest save so far, times this, is kept for the next one."""
STEPS = 5
"""Last steps of which the longest says how long the next one will take."""


def gives_up(left: float, elapsed: float, longest: float | None, saving: float) -> bool:
    """True where a step in flight has to be given up.

    Args:
        left: seconds of the grace period.
        elapsed: seconds since the step began.
        longest: seconds of the longest of the last steps; None: there was none.
        saving: seconds that a save may take.
    """
    rest = 0.0 if longest is None else max(0.0, longest - elapsed)
    return rest + saving > left


class Grace:
    """Steps of a stage, each of which may be given up."""

    def __init__(
        self,
        stop: Stops,
        grace_s: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`grace_s`: `limits.grace`; `say`: tells the user."""
        self._stop, self._grace_s, self._say, self._clock = stop, grace_s, say, clock
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._saving = SAVING_S

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While a checkpoint is written."""
        began = self._clock()
        yield
        self._saving = max(self._saving, SAVES * (self._clock() - began))

    @contextmanager
    def step(self, number: int, save: Callable[[], bool]) -> Iterator[None]:
        """While step `number` (from 1) is worked on and waited for. `save`: writes a checkpoint of what was
        there before it; False where it can't.

        Raises:
            GivenUp: that was done.
        """
        began, tried = self._clock(), False
        longest = max(self._steps, default=None)

        def check() -> None:
            nonlocal tried
            left = self._stop.left(self._grace_s)
            if tried or left is None:
                return
            if gives_up(left, self._clock() - began, longest, min(self._saving, self._grace_s / 2)):
                tried = True
                self._say(f"step {number} is given up: {max(0.0, left):.0f} s of limits.grace are left")
                if save():
                    raise GivenUp(f"before step {number}")
                self._say(f"step {number} goes on: what was there before it can't be saved any more")

        with looking_up(check):
            yield
        self._steps.append(self._clock() - began)

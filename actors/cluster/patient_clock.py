"""The clock of deadlines. It stands still while this process does: a driver that was stopped (SIGSTOP,
Ctrl-Z, a debugger) for minutes has not waited for anybody meanwhile.

Linux has no clock that stops with a process. So this one is looked at often by whoever waits, and a long gap
between two looks counts as a short one. Work between two waits is such a gap too; deadlines then end later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

GAP_S = 5.0
"""Longest gap between two looks that counts. Waits look twice a second, later on a busy machine."""


class PatientClock:
    """Seconds that this process was there, from any start. For use by several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: in seconds; never goes back."""
        self._clock, self._lock = clock, threading.Lock()
        self._last = clock()
        self._seconds = 0.0

    def __call__(self) -> float:
        with self._lock:
            now = self._clock()
            self._seconds += min(GAP_S, now - self._last)
            self._last = now
            return self._seconds


patient = PatientClock()
"""Of this process."""

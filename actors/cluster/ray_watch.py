"""Looks after the processes of Ray that a driver can't do without: the raylet of this machine and the GCS.

A call into a raylet that is stopped has no deadline, never returns and can't be interrupted; of a GCS that is
gone, Ray ends the driver after a minute, without a word of the run's. So a thread looks at the processes
themselves. When one is lost, it says so and kills all of them: calls that wait for them then fail, and the
driver unwinds, or Ray ends it. A driver that does neither is ended here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping

import psutil

from actors.errors import AGAIN

LOOK_S = 0.2
"""Pause between two looks, of 0.1 ms. A driver that waits for a raylet that dies may be ended by Ray sooner,
with exit code 1 and without a word."""
STOPPED_S = 30.0
"""A process that was stopped (SIGSTOP) for longer is lost. One that a debugger looks at goes on sooner."""
UNWIND_S = 60.0
"""Time for the driver to end once a process is lost; past it, it is ended."""


class RayWatch:
    """The watch over some processes, from when it is made until `end`."""

    def __init__(self, processes: Mapping[str, int], in_use: Callable[[], bool] = lambda: True) -> None:
        """`processes`: pid of each, by its name; `in_use`: False once this process has done with them in
        another way than by `end`, as a program does that calls Ray's own shutdown."""
        self.lost: str | None = None
        """What became of a process that is lost, with its name."""
        self._processes = {name: _found(pid) for name, pid in processes.items()}
        self._in_use = in_use
        self._ending, self._unwound = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch-ray")
        self._thread.start()

    def end(self) -> None:
        """From now on the processes may end. `unwound` follows once the driver is through with Ray."""
        self._ending.set()
        self._thread.join(0 if self.lost is not None else None)

    def unwound(self) -> None:
        """The driver is through with Ray."""
        self._unwound.set()

    def kill(self) -> None:
        """End the processes that are left, stopped ones too."""
        for process in filter(None, self._processes.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _look(self) -> None:
        stopped: dict[str, float] = {}
        while self.lost is None:
            if self._ending.wait(LOOK_S):
                return
            lost = None
            for name, process in self._processes.items():
                status = _status(process)
                if status == psutil.STATUS_STOPPED:
                    since = stopped.setdefault(name, time.monotonic())
                    if time.monotonic() - since > STOPPED_S:
                        lost = f"{name} was stopped (SIGSTOP) for {STOPPED_S:g} s"
                else:
                    stopped.pop(name, None)
                if status == psutil.STATUS_ZOMBIE:
                    lost = f"{name} has died (killed, crashed, or out of memory)"
            if lost is not None and not self._in_use():
                return
            self.lost = lost
        # Now, as Ray may end this process as soon as its connection to the raylet breaks.
        sys.stderr.write(f"ray: {self.lost}; the run ends. {AGAIN.capitalize()}\n")
        sys.stderr.flush()
        self.kill()
        if not self._unwound.wait(UNWIND_S):
            os._exit(1)


def _found(pid: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid)
    return None


def _status(process: psutil.Process | None) -> str:
    """Of a process; a zombie where it is gone."""
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.status()
    return psutil.STATUS_ZOMBIE

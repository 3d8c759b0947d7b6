"""Looks after the processes of Ray that a driver can't do without: the raylet of this machine and the GCS.

A call into a raylet that is stopped has no deadline, never returns and can't be interrupted; of a GCS that is
gone, Ray ends the driver after a minute, without a word of the run's. So a thread looks at the processes
themselves. When one is lost, it says so, and whoever waits for an answer gives up (`ray_lost`). A driver that
can't, since its calls don't come back from the raylet, or is not through in time, has all of them killed:
calls that wait for them then fail, and the driver unwinds, or Ray ends it. One that does neither is ended
here.

In a cluster of others nothing is killed. Its GCS, which may be on another machine, is asked for an answer.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping

import psutil

from actors.cluster.patient_clock import patient
from actors.cluster.ray_private import RAYLET
from actors.errors import AGAIN

LOOK_S = 0.2
"""Pause between two looks, of 0.1 ms. A driver that waits for a raylet that dies may be ended by Ray sooner,
with exit code 1 and without a word."""
STOPPED_S = 30.0
"""A process that was stopped (SIGSTOP) for longer is lost. One that a debugger looks at goes on sooner."""
COME_S = 15.0
"""Time for the driver to be through with Ray where only the GCS is lost, before all is killed."""
UNWIND_S = 60.0
"""Time for the driver to end once a process is lost; past it, it is ended."""
UNWIND_BESIDE_S = 10.0
"""The same where nothing is killed: calls that wait for what is stopped don't fail."""
ASK_S = 2.0
"""Pause between two questions of a probe."""
SILENT_S = 50.0
"""One that has not answered for longer is lost. A GCS with a store of its own may come back on another
machine; past 60 s without it Ray ends the driver, without a word."""


class Probe:
    """Asks again and again, in a thread of its own, as an answer may take its time."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        """`ask`: True for an answer; has a deadline of its own."""
        self._ask = ask
        self._answered = patient()
        self._ended = threading.Event()
        threading.Thread(target=self._go_on, daemon=True, name="probe-ray").start()

    @property
    def silent_s(self) -> float:
        """Seconds since the last answer."""
        return patient() - self._answered

    def end(self) -> None:
        """Ask no more."""
        self._ended.set()

    def _go_on(self) -> None:
        while not self._ended.wait(ASK_S):
            if self._ask():
                self._answered = patient()


class RayWatch:
    """The watch over some processes, from when it is made until `end`."""

    def __init__(
        self,
        processes: Mapping[str, int],
        in_use: Callable[[], bool] = lambda: True,
        probes: Mapping[str, Probe] | None = None,
        own: bool = True,
    ) -> None:
        """`processes`: pid of each, by its name; `in_use`: False once this process has done with them in
        another way than by `end`, as a program does that calls Ray's own shutdown; `probes`: by the name of
        what they ask; `own`: the processes go with this one."""
        self.lost: str | None = None
        """Fate of a process that is lost, with its name."""
        self._processes = {name: _found(pid) for name, pid in processes.items()}
        self._in_use, self._probes, self._own = in_use, dict(probes or {}), own
        self._ending, self._unwound = threading.Event(), threading.Event()
        self._looking, self._stopped = threading.Lock(), dict[str, float]()
        self._thread = threading.Thread(target=self._go_on, daemon=True, name="watch-ray")
        self._thread.start()

    def end(self) -> None:
        """From now on the processes may end. `unwound` follows once the driver is through with Ray."""
        self._ending.set()
        for probe in self._probes.values():
            probe.end()
        self._thread.join(0 if self.lost is not None else None)

    def unwound(self) -> None:
        """The driver is through with Ray."""
        self._unwound.set()

    def kill(self) -> None:
        """End the processes that are left, stopped ones too; not those of others."""
        for process in filter(None, self._processes.values() if self._own else ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def look(self) -> str | None:
        """Fate of a process that is lost, by a look at all of them; None while all is well."""
        with self._looking:
            if self.lost is None and not self._ending.is_set():
                lost = self._seen()
                if lost is not None and self._in_use():
                    self.lost = lost
            return self.lost

    def _seen(self) -> str | None:
        lost = None
        for name, probe in self._probes.items():
            if probe.silent_s > SILENT_S:
                lost = f"{name} has not answered for {SILENT_S:g} s"
        for name, process in self._processes.items():
            status = _status(process)
            if status == psutil.STATUS_STOPPED:
                if patient() - self._stopped.setdefault(name, patient()) > STOPPED_S:
                    lost = f"{name} was stopped (SIGSTOP) for {STOPPED_S:g} s"
            else:
                self._stopped.pop(name, None)
            if status == psutil.STATUS_ZOMBIE:
                lost = f"{name} has died (killed, crashed, or out of memory)"
        return lost

    def _go_on(self) -> None:
        while self.look() is None:
            if self._ending.wait(LOOK_S) or not self._in_use():
                return
        # Now, as Ray may end this process as soon as its connection to the raylet breaks.
        sys.stderr.write(f"ray: {self.lost}; the run ends. {AGAIN.capitalize()}\n")
        sys.stderr.flush()
        # A driver whose calls come back sees by itself that something is lost. Ray would end it at once
        # where it loses the raylet too, so one that is stopped goes on meanwhile.
        self._resume()
        if self._own and self._answers_calls() and self._unwound.wait(COME_S):
            return
        self.kill()
        if not self._unwound.wait(UNWIND_S if self._own else UNWIND_BESIDE_S):
            os._exit(1)

    def _resume(self) -> None:
        """Let processes that are stopped go on, for as long as the driver needs to unwind."""
        for process in filter(None, self._processes.values() if self._own else ()):
            if _status(process) == psutil.STATUS_STOPPED:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def _answers_calls(self) -> bool:
        """True if the raylet is there, so that what waits for it comes back."""
        status = _status(self._processes.get(RAYLET))
        return status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)


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

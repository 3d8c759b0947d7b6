"""The pulse of a worker process: a thread notes twice a second, in a file, that the process is alive, what it
does, and how many collectives of each group it has entered.

The counts are torch's own, so that those inside of `fully_shard` are among them, and nothing is done where
collectives are called. Whoever finds a call overdue reads the files of all ranks (`actors.cluster.lookout`):
others wait for the rank that is behind them. A thread that gets no turn, while native code holds the
interpreter, writes nothing: its silence alone is no sign of anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PULSE_S = 0.5
"""Pause between two notes, each of which takes 4 us of CPU time beside what torch takes for its counts."""
RECORD = 4096
"""Bytes of the file, which is one JSON object and blanks. Written at once, it is read whole."""

Counts = Callable[[], Mapping[str, int]]

_counts: Counts | None = None
"""Of the groups that this process is in."""


def count_collectives(counts: Counts | None) -> None:
    """Set what says how many collectives this process has entered: of each group, by its ranks ("0-1")."""
    global _counts
    _counts = counts


def machine() -> str:
    """Name of what process ids belong to: this boot of this machine, and its container."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


class Pulse:
    """The thread, from when this is made until `end`."""

    def __init__(self, path: Path) -> None:
        """`path`: of the file. Never raises: without it no rank is told from another."""
        self.path = path
        self._doing = ""
        self._beats, self._ended = 0, threading.Event()
        threading.Thread(target=self._go_on, daemon=True, name="pulse").start()

    @contextlib.contextmanager
    def during(self, method: str, step: int | str | None) -> Iterator[None]:
        """Note, while it lasts, that a method is called, and for which step."""
        self._doing = method if step is None else f"{method}, step {step}"
        try:
            yield
        finally:
            self._doing = ""

    def end(self) -> None:
        """Write no more."""
        self._ended.set()

    def _go_on(self) -> None:
        try:
            file = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError:
            return
        while not self._ended.wait(PULSE_S):
            self._beats += 1
            note = {"beats": self._beats, "doing": self._doing, "entered": self._entered()}
            with contextlib.suppress(OSError):  # A full disk, which may have room again.
                os.pwrite(file, json.dumps(note).encode()[:RECORD].ljust(RECORD), 0)
        os.close(file)

    def _entered(self) -> dict[str, int]:
        counts = _counts
        try:
            return {} if counts is None else dict(counts())
        except Exception:  # of a group that is left at this moment
            return {}

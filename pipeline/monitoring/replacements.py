"""Processes that were replaced while a run went on: a line each in the run directory, and how many there
were."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.cluster import Replaced

FILE = "replacements.jsonl"
"""In the run directory; there once something was replaced. Further sessions of a run append to it."""


class Replacements:
    """Replacements of one session of a run. Safe under several threads."""

    def __init__(self, directory: Path, note: Callable[[str], None]) -> None:
        """`directory`: of the run; `note`: gets a line if the file can't be written."""
        self._path, self._note = directory / FILE, note
        self._lock = threading.Lock()
        self._stage = ""
        self._step: int | None = None
        self._roles: Counter[str] = Counter()
        self._seconds = 0.0
        self._earlier = 0
        with contextlib.suppress(OSError):
            self._earlier = self._path.read_bytes().count(b"\n")

    @property
    def count(self) -> int:
        """Replacements so far, in all sessions of the run."""
        return self._earlier + self._roles.total()

    def at(self, stage: str, step: int | None = None) -> None:
        """The run works at this stage now, and at this step (from 1) of it; None: at none."""
        self._stage, self._step = stage, step

    def add(self, one: Replaced) -> None:
        """Write a line; one that can't be written is said, and ends nothing."""
        where = {"time": round(time.time(), 3), "stage": self._stage, "step": self._step}
        line = where | asdict(one) | {"seconds": round(one.seconds, 3)}
        with self._lock:
            self._roles[one.role] += 1
            self._seconds += one.seconds
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self._note(f"{self._path}: not written: {error}")

    def said(self) -> str:
        """One line on this session; empty where nothing was replaced."""
        if not self._roles:
            return ""
        roles = ", ".join(f"{role} {times}" for role, times in self._roles.most_common())
        return f"replaced: {roles} ({self._seconds:.1f} s in all); {FILE} says why"

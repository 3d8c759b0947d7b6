"""Tokens, seconds and memory of some processes, read from /proc so that it needs nothing of them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Effort:
    """How long one side is measured."""

    warm_up_steps: int
    """Optimizer steps before the clock starts: first touch of memory, imports inside functions."""
    least_steps: int
    least_seconds: float
    """Measuring ends at the end of the first step after both."""
    batches: int
    """Batches of rows made; a side that needs more begins again."""


@dataclass
class Reading:
    """What was done between two moments."""

    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all threads. Under other load on the machine the steadier measure."""
    steps: int = 0

    def after(self, other: Reading) -> Reading:
        """These tokens with other work done on them first, measured on more or fewer tokens."""
        share = self.tokens / other.tokens
        return Reading(
            self.tokens,
            self.seconds + other.seconds * share,
            self.cpu_seconds + other.cpu_seconds * share,
            self.steps,
        )


@dataclass
class Meter:
    """Reads processes between `start` and each `step`."""

    effort: Effort
    pids: Sequence[int] = field(default_factory=lambda: [os.getpid()])

    def start(self) -> None:
        self._began, self._cpu = time.perf_counter(), cpu_seconds(self.pids)
        self.reading = Reading()

    def step(self, tokens: int) -> bool:
        """Note a finished step; True when it is enough."""
        now = self.reading
        now.tokens, now.steps = now.tokens + tokens, now.steps + 1
        now.seconds = time.perf_counter() - self._began
        now.cpu_seconds = cpu_seconds(self.pids) - self._cpu
        return now.steps >= self.effort.least_steps and now.seconds >= self.effort.least_seconds


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def peak_rss_bytes(pids: Sequence[int]) -> int:
    """Sum of the largest resident sizes that processes have had."""
    total = 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return total * 1024

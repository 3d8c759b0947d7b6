"""One check of a device: its lines of figures, its clock, and what went wrong."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
REASON_CHARACTERS = 300
"""Of an error, in a line."""


class Deviation(Exception):
    """Figures of a section are not those that are right; their lines are written."""


@dataclass
class Check:
    """What all sections share. Every figure is written as soon as it is there."""

    device: torch.device
    tiny: bool
    path: Path
    """JSON lines; each line names its section."""
    budget_s: float
    """What would begin later than this is left out."""
    section: str = ""
    failed: list[str] = field(default_factory=list)
    """Sections, each once."""
    left_out: list[str] = field(default_factory=list)
    bytes_per_s: float | None = None
    """Bandwidth of a copy, once it is measured: read and written bytes."""
    flops_per_s: float | None = None
    """Rate of bfloat16 products, once it is measured."""
    began: float = field(default_factory=time.monotonic)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def tell(self, **figures: Any) -> None:
        """Write a line of figures, to the file and to the terminal."""
        line = {"section": self.section, "at_s": round(time.monotonic() - self.began, 1), **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
        print(
            "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()),
            flush=True,
        )

    # --- Sections and their cases ------------------------------------------------------------------

    def run(self, name: str, section: Callable[[Check], None]) -> None:
        """Run a section; its failure is noted, and the next one can run."""
        self.section = name
        if self._is_over():
            self.left_out.append(name)
            self.tell(left_out=f"{self.budget_s:.0f} s were over")
            return
        with self._noting(case=None):
            section(self)
        self.free()

    def cases(self, cases: Iterable[T], reserve_s: float = 0.0) -> Iterator[T]:
        """The cases of a section that begin within the time; a line says which ones are left out.

        `reserve_s`: time that is kept for what follows them.
        """
        remaining = list(cases)
        while remaining and not self._is_over(reserve_s):
            yield remaining.pop(0)
        if remaining:
            self.left_out.append(f"{self.section}: {len(remaining)} cases")
            self.tell(left_out=f"{self.budget_s - reserve_s:.0f} s were over", cases=remaining)

    @contextlib.contextmanager
    def case(self, **case: Any) -> Iterator[None]:
        """One of several measurements: what it raises fails the section and lets the others run.

        A case that does not fit into the device's memory is a finding, and no failure.
        """
        with self._noting(case):
            try:
                yield
            except torch.OutOfMemoryError:
                self.tell(**case, out_of_memory=True)
        self.free()

    @contextlib.contextmanager
    def _noting(self, case: dict[str, Any] | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not isinstance(error, Deviation):
                traceback.print_exc()
            if self.section not in self.failed:
                self.failed.append(self.section)
            self.tell(**(case or {}), failed=f"{type(error).__name__}: {str(error)[:REASON_CHARACTERS]}")

    def _is_over(self, reserve_s: float = 0.0) -> bool:
        return time.monotonic() - self.began > self.budget_s - reserve_s

    # --- Measuring ---------------------------------------------------------------------------------

    def seconds(self, work: Callable[[], Any], repeats: int = 5, warm_ups: int = 2) -> float:
        """Median time of some work, until the device has done it."""
        if self.tiny:
            repeats, warm_ups = min(repeats, 2), min(warm_ups, 1)
        for _ in range(warm_ups):
            work()
        return statistics.median(self.once(work) for _ in range(repeats))

    def once(self, work: Callable[[], Any]) -> float:
        """Time of some work, until the device has done it."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def watch_memory(self) -> None:
        """`peak_gib` counts from here."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Most memory that tensors have had; None on the CPU, which keeps no account."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_cuda else None

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def floor_s(self, flops: float) -> float | None:
        """Time of so many operations at the measured rate of products."""
        return None if self.flops_per_s is None else flops / self.flops_per_s

    def kernels(self, work: Callable[[], Any], most: int = 12) -> dict[str, Any]:
        """Calls of kernels in some work, and those that take longest: (name, calls, ms)."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
        with profile(activities=activities) as seen:
            self.once(work)
        own = "self_device_time_total" if self.on_cuda else "self_cpu_time_total"
        events = [event for event in seen.key_averages() if getattr(event, own) > 0]
        events.sort(key=lambda event: -getattr(event, own))
        longest = [(e.key[:60], e.count, round(getattr(e, own) / 1e3, 2)) for e in events[:most]]
        return {"calls": sum(event.count for event in events), "longest": longest}

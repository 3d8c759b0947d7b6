"""The most memory that each process has had, from the traces of its calls. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.stage_graph import byte_text
from pipeline.report.timeline import LANES, Call, lanes, role_of


@dataclass(frozen=True)
class MemoryBar:
    """One process, or all of a role where there are many: its largest."""

    label: str
    text: str
    percent: float
    """Of the largest."""


def memory_bars(calls: Sequence[Call]) -> list[MemoryBar]:
    """A bar a process, role by role; of more than `LANES` processes, one a role."""
    peaks: dict[str, int] = {}
    for call in calls:
        if call.peak_rss is not None:
            peaks[call.lane] = max(call.peak_rss, peaks.get(call.lane, 0))
    names = [lane for lane in lanes(calls) if lane in peaks]
    rows = [(lane, peaks[lane]) for lane in names]
    if len(rows) > LANES:
        by_role: dict[str, list[int]] = {}
        for lane in names:
            by_role.setdefault(role_of(lane), []).append(peaks[lane])
        rows = [(f"{role}, largest of {len(found)}", max(found)) for role, found in by_role.items()]
    largest = max((peak for _, peak in rows), default=0)
    return [MemoryBar(label, byte_text(peak), round(100 * peak / largest, 2)) for label, peak in rows]

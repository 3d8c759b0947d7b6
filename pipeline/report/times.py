"""Time and memory in the report: timeline, waiting, time by cause, memory by process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.monitoring.formatting import duration
from pipeline.report.figure import Drawing
from pipeline.report.run_view import RunView
from pipeline.report.stage_graph import byte_text
from pipeline.report.timeline import (
    LANES,
    Call,
    Waiting,
    detail_window,
    lanes,
    online_window,
    role_of,
    waiting,
)
from pipeline.report.timeline_plot import draw_timeline


@dataclass(frozen=True)
class Timeline:
    """Work of the processes, drawn whole and in detail, and a table of whom each waited for."""

    drawings: list[Drawing]
    waits: list[tuple[str, str, str]]
    """Process, share of its time at work, and for whom it waited in the rest, as texts."""
    window: str
    """Name of the time that the shares are of."""


@dataclass(frozen=True)
class TimeBar:
    """One cause of waiting: seconds, and percent of the longest."""

    label: str
    kind: str
    text: str
    percent: float


def timeline(run: RunView, plots_dir: Path) -> Timeline:
    """Draw who worked when, and sum up who waited for whom."""
    whole = (min(call.start for call in run.calls), max(call.end for call in run.calls))
    drawings = [draw_timeline(run.calls, whole, "Whole run", plots_dir / "timeline.png")]
    detail = detail_window(run.calls)
    if detail is not None:
        path = plots_dir / "timeline-steps.png"
        drawings.append(draw_timeline(run.calls, detail, "A few steps of the online stage", path))
    online = online_window(run.calls)
    return Timeline(
        drawings,
        [wait_texts(one) for one in waiting(run.calls, online or whole)] if whole[1] > whole[0] else [],
        "Shares of the time from the first weight sync to the last"
        if online
        else "Shares of the time from the first call to the last",
    )


def wait_texts(one: Waiting) -> tuple[str, str, str]:
    """A process's row of the table; causes below half a percent are left out."""
    causes = [f"{role} {share:.0%}" for role, share in one.waits.items() if share >= 0.005]
    return one.lane, f"{one.busy:.0%}".replace("%", " %"), ", ".join(causes).replace("%", " %")


def time_bars(run: RunView) -> list[TimeBar]:
    """Start-up by cause, then stages, what these waited for, and evaluations, each against the longest."""
    causes = [(label, "start-up", seconds) for label, seconds in run.startup.items()]
    for stage in run.stages:
        causes += [(stage.name, "stage", stage.seconds)] if stage.seconds else []
        causes += [(f"{stage.name}, before its first step", "wait", stage.wait)] if stage.wait else []
    causes += [(f"evaluation of {row.model}", "evaluation", row.seconds) for row in run.evals if row.seconds]
    longest = max((seconds for _, _, seconds in causes), default=0.0)
    return [
        TimeBar(label.replace("_", " "), kind, duration(seconds), round(100 * seconds / longest, 2))
        for label, kind, seconds in causes
        if longest > 0
    ]


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

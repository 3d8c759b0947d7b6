"""Where the time of a run went: who worked when, who waited for whom, which cause took how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.monitoring.progress import duration
from pipeline.report.figure import Drawing
from pipeline.report.timeline import Waiting, detail_window, online_window, waiting
from pipeline.report.timeline_plot import draw_timeline
from pipeline.report.view import RunView


@dataclass(frozen=True)
class Timeline:
    """What the processes did, drawn whole and in detail, and for whom each waited."""

    drawings: list[Drawing]
    waits: list[tuple[str, str, str]]
    """Process, share of its time at work, and for whom it waited in the rest, as texts."""
    window: str
    """Which time the shares are of."""


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
    """Start-up by cause, then stages and evaluations, each against the longest."""
    causes = [(label, "start-up", seconds) for label, seconds in run.startup.items()]
    causes += [(stage.name, "stage", stage.seconds) for stage in run.stages if stage.seconds]
    causes += [(f"evaluation of {row.model}", "evaluation", row.seconds) for row in run.evals if row.seconds]
    longest = max((seconds for _, _, seconds in causes), default=0.0)
    return [
        TimeBar(label.replace("_", " "), kind, duration(seconds), round(100 * seconds / longest, 2))
        for label, kind, seconds in causes
        if longest > 0
    ]

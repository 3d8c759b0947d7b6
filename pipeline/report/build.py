"""report.html: one self-contained file about a run, made from the files of its directory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.progress import MARKS, duration
from pipeline.report.figure import Drawing, file_name
from pipeline.report.heatmaps import draw_heatmaps
from pipeline.report.memory import memory_bars
from pipeline.report.paired import paired_difference
from pipeline.report.panels import charts, format_value
from pipeline.report.plots import draw_chart
from pipeline.report.samples import Side, StepSamples, samples_by_step, side_by_side, stage_samples
from pipeline.report.series import Series
from pipeline.report.stage_graph import artifact_text, interval_text, is_share, score_text, stage_graph
from pipeline.report.timeline import Waiting, chrome_trace, detail_window, online_window, waiting
from pipeline.report.timeline_plot import draw_timeline
from pipeline.report.view import EvalRow, RunView, StageView, read_run

HERE = Path(__file__).parent


@dataclass(frozen=True)
class StageSection:
    """What the report shows of one stage."""

    stage: StageView
    anchor: str
    passed_on: str
    first: list[Drawing]
    """Charts that answer "did it learn?"."""
    mechanics: list[Drawing]
    heatmaps: list[Drawing]
    """Experts: their loads, and what each layer's router did over the steps."""
    rows: list[tuple[str, str, str, str]]
    """Metric, first, last and best-known extremes, as texts: the charts in numbers."""
    samples: Side | None
    by_step: list[StepSamples]
    """Samples of a stage that generates while it trains; `samples` is None then."""


@dataclass(frozen=True)
class EvalLine:
    """One line of the evaluation table; `left`, `low`, `high` are percent of the drawing's width."""

    row: EvalRow
    text: str
    interval: str
    change: str
    verdict: str
    """better, worse or even against the line above, on the same prompts; empty where unknown."""
    left: float
    low: float
    high: float


@dataclass(frozen=True)
class EvalTable:
    """Models with the same metric. `of`: what was scored, prompts or pairs."""

    metric: str
    of: str
    lines: list[EvalLine]


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


def build_report(run_dir: Path | str) -> Path:
    """Write RUN_DIR/report.html, plots/*.png and, of a run with traces, trace.json; the path of the first.

    Works on any run that has a run.json, finished or not. UserError when there is none.
    """
    run = read_run(run_dir)
    path = run.directory / "report.html"
    html = render(run, run.directory / "plots")
    if run.calls:
        _replace(run.directory / "trace.json", json.dumps(chrome_trace(run.calls)))
    _replace(path, html)
    return path


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    # A byte-level model can write half a surrogate pair, which UTF-8 has no form for.
    aside.write_text(text, encoding="utf-8", errors="replace")
    os.replace(aside, path)


def render(run: RunView, plots_dir: Path) -> str:
    """The page of a run; draws its plots into `plots_dir` on the way."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Autoescape: completions and prompts are text from a model, and may hold HTML.
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(duration=duration, marks=MARKS)
    return environment.get_template("template.html").render(
        run=run,
        css=(HERE / "style.css").read_text(encoding="utf-8"),
        headline=headline(run),
        facts=headline_facts(run),
        graph=stage_graph(run),
        sections=[stage_section(stage, plots_dir) for stage in run.stages if has_content(stage)],
        evals=eval_tables(run.evals, run.completions),
        samples=side_by_side(run.completions) if run.completions else None,
        timeline=timeline(run, plots_dir) if run.calls else None,
        times=time_bars(run),
        memory=memory_bars(run.calls),
        config_lines=config_lines(run.config_text),
    )


def has_content(stage: StageView) -> bool:
    """Whether there is anything to show of a stage beyond its box in the graph."""
    drawn = stage.series or stage.router_load or stage.routing
    return bool(drawn or stage.samples or stage.metrics or stage.error)


def headline(run: RunView) -> str:
    """The result in one line: the figure of each model of the main table, in order."""
    rows = next(iter(by_metric(run.evals).values()), [])
    if not rows:
        return ""
    return f"{metric_name(rows[0].metric)}: " + " → ".join(f"{row.model} {score_text(row)}" for row in rows)


def by_metric(rows: Sequence[EvalRow]) -> dict[str, list[EvalRow]]:
    """Evaluations that can be compared, together; those of reward models last."""
    found: dict[str, list[EvalRow]] = {}
    for row in sorted(rows, key=lambda row: row.of_pairs):
        found.setdefault(row.metric, []).append(row)
    return found


def metric_name(metric: str) -> str:
    """A metric's name as words."""
    return metric.replace("_", " ")


def headline_facts(run: RunView) -> list[str]:
    """Small facts under the title."""
    seconds = run.seconds or sum(stage.seconds or 0 for stage in run.stages)
    so_far = "in all" if run.state == "done" else "so far"
    facts = [run.began, f"{duration(seconds)} {so_far}" if seconds else "", f"base {run.base}"]
    return [fact for fact in facts if fact]


def stage_section(stage: StageView, plots_dir: Path) -> StageSection:
    """Draw a stage's charts and gather its figures."""
    found, constants = charts(stage.series)
    drawings = [draw_chart(chart, stage.name, plots_dir) for chart in found]
    units = {key: chart.panel.unit for chart in found for key in chart.panel.keys}
    rows = []
    for key, series in stage.series.items():
        unit = units.get(key.removeprefix("eval_"), "number")
        last = format_value(series.values[-1], unit)
        if key in constants:
            rows.append((key, last, last, "constant"))
            continue
        extremes = f"{format_value(min(series.values), unit)} to {format_value(max(series.values), unit)}"
        rows.append((key, format_value(series.values[0], unit), last, extremes))
    # A stage of few metrics has no page of mechanics to fold away.
    fold = len(drawings) > 4 and any(drawing.first for drawing in drawings)
    rewards = stage.series.get("reward", Series([], []))
    by_step = samples_by_step(stage.samples, dict(zip(rewards.steps, rewards.values)))
    return StageSection(
        stage=stage,
        anchor=f"stage-{file_name(stage.name)}",
        passed_on=artifact_text(stage),
        first=[drawing for drawing in drawings if drawing.first or not fold],
        mechanics=[drawing for drawing in drawings if not drawing.first and fold],
        heatmaps=draw_heatmaps(stage, plots_dir),
        rows=rows,
        samples=stage_samples(stage.samples) if stage.samples and not by_step else None,
        by_step=by_step,
    )


def eval_tables(
    rows: Sequence[EvalRow], completions: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[EvalTable]:
    """One table a metric."""
    return [
        EvalTable(
            metric_name(metric), "pairs" if own[0].of_pairs else "prompts", eval_lines(own, completions)
        )
        for metric, own in by_metric(rows).items()
    ]


def eval_lines(rows: list[EvalRow], completions: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[EvalLine]:
    """The evaluation table with each interval's place on a common scale (0 to 100 % for shares)."""
    if not rows:
        return []
    ends = [end for row in rows for end in (row.value, *(row.ci95 or ()))]
    shares = all(is_share(row) for row in rows)
    low, high = (0.0, 1.0) if shares else (min(ends), max(ends))
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    lines: list[EvalLine] = []
    for before, row in zip([None, *rows], rows, strict=False):
        bounds = row.ci95 or (row.value, row.value)
        change, verdict = change_text(before, row, completions) if before else ("", "")
        lines.append(
            EvalLine(
                row=row,
                text=score_text(row),
                interval=interval_text(row),
                change=change,
                verdict=verdict,
                left=place(row.value),
                low=place(bounds[0]),
                high=place(bounds[1]),
            )
        )
    return lines


def change_text(
    before: EvalRow, row: EvalRow, completions: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[str, str]:
    """Difference to the line above (in points for shares), and the verdict where prompts can be paired."""
    scale, unit = (100, " points") if is_share(before) and is_share(row) else (1, "")
    digits = ".1f" if unit else ".3g"
    earlier, later = completions.get(before.model, ()), completions.get(row.model, ())
    # Rows of another evaluation than the table's would give another difference than the table's.
    whole = len(earlier) == before.n and len(later) == row.n
    paired = paired_difference(earlier, later) if whole else None
    if paired is None:
        return f"{scale * (row.value - before.value):+{digits}}{unit}", ""
    low, high = scale * paired.low, scale * paired.high
    return f"{scale * paired.value:+{digits}}{unit} ({low:+{digits}} to {high:+{digits}})", paired.verdict


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


def config_lines(text: str) -> list[tuple[str, str, str]]:
    """A YAML text's lines as (indent, key, rest), so that keys can be set apart."""
    lines = []
    for line in text.splitlines():
        match = re.match(r"^(\s*(?:- )?)([\w./-]+:)(.*)$", line)
        lines.append((match[1], match[2], match[3]) if match else ("", "", line))
    return lines

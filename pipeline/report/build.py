"""Builds report.html, one self-contained file about a run, from the files of its directory."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.monitoring.formatting import MARKS, duration, local_time
from pipeline.report.evals import eval_tables, headline
from pipeline.report.figure import Drawing, file_name, replace_bytes
from pipeline.report.heatmaps import draw_heatmaps
from pipeline.report.panels import charts, format_value
from pipeline.report.plots import draw_chart
from pipeline.report.read_run import read_run
from pipeline.report.run_view import RunView, StageView
from pipeline.report.samples import Side, StepSamples, samples_by_step, side_by_side, stage_samples
from pipeline.report.series import Series
from pipeline.report.settings import settings
from pipeline.report.stage_graph import artifact_text, stage_graph
from pipeline.report.timeline import chrome_trace
from pipeline.report.times import memory_bars, time_bars, timeline
from pipeline.report.tolerant_reading import as_number

HERE = Path(__file__).parent


@dataclass(frozen=True)
class StageSection:
    """One stage in the report: charts, tables and samples."""

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


def build_report(run_dir: Path | str, *, works: bool = False) -> Path:
    """Write RUN_DIR/report.html, plots/*.png and, of a run with traces, trace.json; the path of the first.

    Any run that has a run.json has a report, finished or not; `works`: it runs at this moment.

    Raises:
        UserError: there is no run.json.
    """
    run = read_run(run_dir, works=works)
    path = run.directory / "report.html"
    html = render(run, run.directory / "plots")
    if run.calls:
        replace_text(run.directory / "trace.json", json.dumps(chrome_trace(run.calls)))
    replace_text(path, html)
    return path


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically; two reports of one run may be written at once."""
    # A byte-level model can write half a surrogate pair, which UTF-8 has no form for.
    replace_bytes(path, text.encode("utf-8", errors="replace"))


def render(run: RunView, plots_dir: Path) -> str:
    """The HTML of a run's report; its plots are drawn into `plots_dir`."""
    sections = [stage_section(stage, plots_dir) for stage in run.stages if has_content(stage)]
    shown = {
        "graph": stage_graph(run),
        "settings": settings(run.config),
        "evals": eval_tables(run.evals, run.completions),
        "samples": side_by_side(run.completions) if run.completions else None,
        "timeline": timeline(run, plots_dir) if run.calls else None,
        "times": time_bars(run),
        "memory": memory_bars(run.calls),
        "replaced": replaced_rows(run),
        "config_lines": config_lines(run.config_text),
    }
    return fill(
        "template.html",
        run=run,
        sections=sections,
        contents=contents(run, sections, shown),
        headline=headline(run.evals),
        status=status(run),
        facts=headline_facts(run),
        **shown,
    )


def fill(name: str, **values: Any) -> str:
    """A page of this package from its template; it needs nothing from outside.

    Everything but what a template marks as safe is escaped: completions and prompts are text from a model,
    and may hold HTML.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(duration=duration, marks=MARKS)
    css = (HERE / "style.css").read_text(encoding="utf-8")
    written = local_time(time.time(), "%Y-%m-%d %H:%M")
    return environment.get_template(name).render(css=css, written=written, **values)


def contents(run: RunView, sections: list[StageSection], shown: dict[str, Any]) -> list[tuple[str, str]]:
    """Anchors and titles of the sections that the page has, in its order."""
    samples = shown["samples"]
    found = [
        ("stages", "Stages", True),
        ("settings", "Settings", shown["settings"].facts or shown["settings"].stages),
        ("evaluation", "Evaluation", shown["evals"]),
        *((section.anchor, section.stage.name, True) for section in sections),
        ("generations", "Generations", samples and samples.samples),
        ("timeline", "Timeline", shown["timeline"]),
        ("time", "Time", shown["times"]),
        ("memory", "Memory", shown["memory"]),
        ("replaced", "Replaced processes", run.replacements),
        ("config", "Config and versions", shown["config_lines"] or run.versions),
    ]
    return [(anchor, title) for anchor, title, there in found if there]


def status(run: RunView) -> str:
    """State of the run in words; of one that works, how far it is and as of when."""
    if run.state != "running":
        return run.state
    stage = next((stage for stage in run.stages if stage.state == "running"), None)
    at = [f"{stage.name}: step {stage.steps_done}"] if stage else []
    if stage and stage.total_steps is not None:
        at[0] += f" of {stage.total_steps}"
    return ", ".join(["running", *at, f"as of {local_time(run.as_of, '%H:%M')}"])


def has_content(stage: StageView) -> bool:
    """True where there is more to show of a stage than its box in the graph."""
    drawn = stage.series or stage.router_load or stage.routing
    return bool(drawn or stage.samples or stage.metrics or stage.error)


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
    # A stage of few metrics has no second section of charts to fold away.
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


def replaced_rows(run: RunView) -> list[tuple[str, str, str, str, str]]:
    """Date, moment, process, reason and seconds of each process that was replaced, as texts."""
    rows = []
    for one in run.replacements:
        at, seconds, step = (as_number(one.get(key)) for key in ("time", "seconds", "step"))
        moment = str(one.get("stage") or "") + ("" if step is None else f" step {step:.0f}")
        rows.append(
            (
                "" if at is None else local_time(at, "%Y-%m-%d %H:%M:%S"),
                moment,
                f"{one.get('role')}-{one.get('rank')}",
                str(one.get("reason") or ""),
                "" if seconds is None else duration(seconds),
            )
        )
    return rows


def config_lines(text: str) -> list[tuple[str, str, str]]:
    """A YAML text's lines as (indent, key, rest), so that keys can be set apart."""
    lines = []
    for line in text.splitlines():
        match = re.match(r"^(\s*(?:- )?)([\w./-]+:)(.*)$", line)
        lines.append((match[1], match[2], match[3]) if match else ("", "", line))
    return lines

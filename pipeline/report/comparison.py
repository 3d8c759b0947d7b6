"""Two or more runs beside each other: settings that differ, curves over each other, last figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.monitoring.formatting import duration
from pipeline.report.evals import by_metric, interval_text, metric_name, score_text
from pipeline.report.panels import HELD_OUT, Chart, charts, format_value
from pipeline.report.run_view import RunView, StageView
from pipeline.report.series import Series
from pipeline.report.settings import flat
from pipeline.report.tolerant_reading import as_mapping

NAMES_NOT_SETTINGS = frozenset({"name", "output_dir"})
"""Keys that differ between any two runs, and change nothing in what they make."""

NONE = "\N{EN DASH}"
"""Stands where a run has nothing to compare."""

LABEL_LIMIT = 18
"""Characters of a run's label: those of three runs fit a chart."""

Rows = list[tuple[str, list[str]]]
"""A line each: its name, and a text a run."""


@dataclass(frozen=True)
class StageComparison:
    """One stage that at least two runs have. `charts`: a metric each, a curve a run."""

    name: str
    states: list[str]
    """Of each run: its state, and how far it came."""
    charts: list[Chart]
    figures: Rows
    """Last value of every metric; those of the charts that answer "did it learn?" first."""
    main: int
    """Number of these first ones."""


@dataclass(frozen=True)
class Comparison:
    """Everything that a page about several runs shows, as texts and charts."""

    runs: list[RunView]
    labels: list[str]
    overview: Rows
    settings: Rows
    """Those that differ."""
    evaluations: Rows
    stages: list[StageComparison]
    notes: list[str]


def compare(runs: Sequence[RunView]) -> Comparison:
    """Put runs beside each other; stages are matched by their names, metrics by theirs."""
    labels = labels_of(runs)
    names = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    found = [[_stage(run, name) for run in runs] for name in names]
    shared = [(name, stages) for name, stages in zip(names, found) if sum(map(bool, stages)) > 1]
    notes = [f"{label}: {note}" for label, run in zip(labels, runs) for note in run.notes]
    for label, run in zip(labels, runs):
        alone = [stage.name for stage in run.stages if stage.name not in dict(shared)]
        notes += [f"only in {label}: {', '.join(alone)}"] if alone else []
        notes += [f"{label}: no settings, config.yaml is missing or can't be read"] if not run.config else []
    sections = [_compare_stage(name, stages, labels) for name, stages in shared]
    if not shared:
        notes.append("no stage has the same name in two of the runs, so there are no curves to lay over")
    elif not any(section.charts for section in sections):
        notes.append("no metric was logged by two of the runs in the same stage, so there are no curves")
    return Comparison(
        list(runs), labels, _overview(runs), differing(runs), _evaluations(runs), sections, notes
    )


def labels_of(runs: Sequence[RunView]) -> list[str]:
    """Short names of the runs, each another: the run's own, or where two share one the directory's."""
    for names in (
        [run.name for run in runs],
        [run.directory.resolve().name for run in runs],
        [str(run.directory) for run in runs],
    ):
        short = [name if len(name) <= LABEL_LIMIT else f"{name[: LABEL_LIMIT - 1]}…" for name in names]
        if len(set(short)) == len(short):
            return short
    return [f"{at + 1}: {run.name[: LABEL_LIMIT - 4]}" for at, run in enumerate(runs)]


def differing(runs: Sequence[RunView]) -> Rows:
    """Settings that are not the same in all runs, by dotted key; of a run without settings, nothing."""
    stages = [as_mapping(run.config.get("stages")) for run in runs if run.config]
    apart = {name for found in stages for name in found if not all(name in other for other in stages)}
    known = [dict(flat(_without(run.config, apart))) if run.config else None for run in runs]
    keys = dict.fromkeys(key for settings in known for key in settings or {})
    rows: Rows = []
    for key in keys:
        if key in NAMES_NOT_SETTINGS:
            continue
        texts = [NONE if settings is None else settings.get(key) or NONE for settings in known]
        if len({text for text, settings in zip(texts, known) if settings is not None}) > 1:
            rows.append((key, texts))
    return rows


def _without(config: dict[str, Any], apart: set[str]) -> dict[str, Any]:
    """A config in which stages that not all runs have are told by their type alone."""
    stages = as_mapping(config.get("stages"))
    shown = {
        name: as_mapping(stage).get("type", "there") if name in apart else stage
        for name, stage in stages.items()
    }
    return {**config, "stages": shown}


def overlays(stages: Mapping[str, Mapping[str, Series]]) -> list[Chart]:
    """Charts of the metrics that at least two runs logged: one a metric, a curve a run, dashed if held out.

    `stages`: the metrics of one stage, by label of the run.
    """
    return [over for chart in charts(joined(stages, 2))[0] for over in _split(chart, stages)]


def joined(stages: Mapping[str, Mapping[str, Series]], least: int) -> dict[str, Series]:
    """Metrics that at least so many runs logged, all points of all runs in one series: so that it is asked of
    all runs at once which metrics share a panel, and whether one never changed."""
    found: dict[str, list[Series]] = {}
    for series in stages.values():
        for key, one in series.items():
            found.setdefault(key, []).append(one)
    return {
        key: Series([step for one in many for step in one.steps], [v for one in many for v in one.values])
        for key, many in found.items()
        if len(many) >= least
    }


def _split(chart: Chart, stages: Mapping[str, Mapping[str, Series]]) -> list[Chart]:
    """A chart a metric of a panel; its held-out counterpart joins it."""
    metrics = {key: label for label, key in chart.metrics.items()}
    if chart.total is not None:
        metrics[chart.panel.total] = "total"
    apart = {
        key for key in metrics if key.removeprefix("eval_") not in metrics or not key.startswith("eval_")
    }
    found = []
    for key in [key for key in metrics if key in apart]:
        several = len(apart) > 1 or key.startswith("eval_")
        title = f"{chart.panel.title}: {metrics[key]}" if several else chart.panel.title
        curves: dict[str, Series] = {}
        for label, series in stages.items():
            for name, end in ((key, ""), (f"eval_{key}", f" {HELD_OUT}")):
                if name in series and (name == key or name in metrics):
                    curves[f"{label}{end}"] = series[name]
        panel = replace(chart.panel, title=title, total="")
        found.append(Chart(panel, curves, chart.first, None, dict.fromkeys(curves, key), list(stages)))
    return found


def _stage(run: RunView, name: str) -> StageView | None:
    return next((stage for stage in run.stages if stage.name == name), None)


def _compare_stage(name: str, stages: Sequence[StageView | None], labels: Sequence[str]) -> StageComparison:
    there = {label: stage.series for label, stage in zip(labels, stages) if stage is not None}
    shown, constants = charts(joined(there, 1))
    units = {key: chart.panel.unit for chart in shown for key in _keys(chart)}
    main = sum(len(_keys(chart)) for chart in shown if chart.first)

    def last(stage: StageView | None, key: str) -> str:
        series = stage.series.get(key) if stage is not None else None
        return NONE if series is None else format_value(series.values[-1], units.get(key, "number"))

    figures = [(key, [last(stage, key) for stage in stages]) for key in [*units, *constants]]
    return StageComparison(name, [_progress(stage) for stage in stages], overlays(there), figures, main)


def _keys(chart: Chart) -> list[str]:
    return [*chart.metrics.values(), *([chart.panel.total] if chart.total is not None else [])]


def _progress(stage: StageView | None) -> str:
    """`done, step 100, 48 s`."""
    if stage is None:
        return NONE
    step = f"step {stage.steps_done}" if stage.steps_done else ""
    took = duration(stage.seconds) if stage.seconds else ""
    return ", ".join(part for part in (stage.state, step, took) if part)


def _overview(runs: Sequence[RunView]) -> Rows:
    rows = [
        ("state", [run.state for run in runs]),
        ("began", [run.began or NONE for run in runs]),
        ("took", [duration(run.seconds) if run.seconds else NONE for run in runs]),
        ("base", [run.base for run in runs]),
        ("raylign", [run.versions.get("raylign", NONE) for run in runs]),
        ("directory", [str(run.directory) for run in runs]),
    ]
    return [(name, texts) for name, texts in rows if any(text != NONE for text in texts)]


def _evaluations(runs: Sequence[RunView]) -> Rows:
    """A line a model and metric, with 95 % intervals; the same model of two runs stands on one line."""
    found = [{(row.model, row.metric): row for row in run.evals} for run in runs]
    every = [row for run in runs for row in run.evals]
    keys = dict.fromkeys((row.model, row.metric) for rows in by_metric(every).values() for row in rows)
    rows: Rows = []
    for key in keys:
        texts = []
        for evals in found:
            row = evals.get(key)
            interval = f" ({interval_text(row)})" if row is not None and row.ci95 is not None else ""
            texts.append(NONE if row is None else f"{score_text(row)}{interval}")
        rows.append((f"{key[0]}, {metric_name(key[1])}", texts))
    return rows

"""Writes the page that lays several runs over each other, one self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.errors import UserError
from pipeline.report.build import fill, replace_text
from pipeline.report.comparison import Comparison, StageComparison, compare
from pipeline.report.figure import SERIES, Drawing, file_name
from pipeline.report.plots import draw_chart
from pipeline.report.read_run import read_run


@dataclass(frozen=True)
class OverlaySection:
    """One stage on the page: its charts drawn."""

    stage: StageComparison
    anchor: str
    first: list[Drawing]
    """Charts that answer "did it learn?"."""
    mechanics: list[Drawing]


def read_runs(directories: Sequence[Path]) -> Comparison:
    """Read run directories and put them beside each other.

    Raises:
        UserError: fewer than two or too many of them, one named twice, or one that is no run.
    """
    if not 2 <= len(directories) <= len(SERIES):
        raise UserError(f"compare: takes 2 to {len(SERIES)} run directories, not {len(directories)}")
    real = [directory.resolve() for directory in directories]
    if again := {str(one) for one, place in zip(directories, real) if real.count(place) > 1}:
        raise UserError(f"compare: {', '.join(sorted(again))}: the same run twice; name different runs")
    problems, runs = [], []
    for directory in directories:
        try:
            runs.append(read_run(directory))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return compare(runs)


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page about runs to `path`, atomically; its parent directories are made."""
    sections = [overlay_section(stage) for stage in comparison.stages]
    contents = [
        ("runs", "Runs"),
        ("settings", "Settings that differ"),
        *([("evaluation", "Evaluation")] if comparison.evaluations else []),
        *((section.anchor, section.stage.name) for section in sections),
    ]
    html = fill(
        "compare.html",
        comparison=comparison,
        sections=sections,
        contents=contents,
        legend=list(zip(comparison.labels, comparison.runs, SERIES)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, html)
    return path


def overlay_section(stage: StageComparison) -> OverlaySection:
    """Draw a stage's charts."""
    drawings = [draw_chart(chart, stage.name, None) for chart in stage.charts]
    fold = len(drawings) > 4 and any(drawing.first for drawing in drawings)
    return OverlaySection(
        stage,
        f"stage-{file_name(stage.name)}",
        [drawing for drawing in drawings if drawing.first or not fold],
        [drawing for drawing in drawings if fold and not drawing.first],
    )

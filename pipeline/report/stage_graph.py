"""Lays out the stage graph as boxes and arrows with coordinates; the HTML template draws them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.monitoring.formatting import MARKS, duration
from pipeline.report.evals import score_text
from pipeline.report.run_view import BASE, REWARD, RunView, StageView

BOX_WIDTH = 178
BOX_HEIGHT, SCORE_HEIGHT = 76, 16
"""Of a box, and what it has more where models were evaluated."""
GAP_X, GAP_Y = 112, 26
MARGIN = 10


@dataclass(frozen=True)
class Box:
    """One stage, or the base: top left corner in pixels, and its lines of text."""

    name: str
    state: str
    kind: str
    facts: str
    score: str
    x: int
    y: int
    height: int
    width: int = BOX_WIDTH


@dataclass(frozen=True)
class Arrow:
    """An arrow between two stages: an SVG path, the label (what is handed on), and the label's centre."""

    path: str
    label: str
    x: float
    y: float
    read: bool
    """Drawn dashed: used as it is (reference, reward model), not trained further."""


@dataclass(frozen=True)
class StageGraph:
    """The drawing and its size in pixels."""

    boxes: list[Box]
    arrows: list[Arrow]
    width: int
    height: int


def stage_graph(run: RunView) -> StageGraph:
    """Lay the stages out left to right by what they start from; stages from one parent share a column."""
    known = {BASE, *(stage.name for stage in run.stages)}
    cells = _cells(run.stages)
    scores = {row.model: f"{score_text(row)}{' of pairs' if row.of_pairs else ''}" for row in run.evals}
    height = BOX_HEIGHT + (SCORE_HEIGHT if scores else 0)

    def box(name: str, state: str, kind: str, facts: str) -> Box:
        column, row = cells[name]
        x, y = MARGIN + column * (BOX_WIDTH + GAP_X), MARGIN + row * (height + GAP_Y)
        return Box(name, state, kind, facts, scores.get(name, ""), x, y, height)

    boxes = {BASE: box(BASE, "base", short_path(run.base), "")}
    for stage in run.stages:
        kind = stage.type if stage.type != stage.name else ""
        boxes[stage.name] = box(stage.name, stage.state, kind, _facts(stage))
    passed = {stage.name: artifact_text(stage) for stage in run.stages}
    arrows = []
    for stage in run.stages:
        parent = stage.init if stage.init in known else BASE
        arrows.append(_arrow(boxes[parent], boxes[stage.name], passed.get(parent, "")))
        arrows += [_read_arrow(boxes[name], boxes[stage.name], use) for name, use in stage.reads.items()]
    lows = [box.y + box.height for box in boxes.values()] + [math.ceil(arrow.y) + 8 for arrow in arrows]
    return StageGraph(
        boxes=list(boxes.values()),
        arrows=arrows,
        width=max(box.x for box in boxes.values()) + BOX_WIDTH + MARGIN,
        height=max(lows) + MARGIN,
    )


def _cells(stages: Sequence[StageView]) -> dict[str, tuple[int, int]]:
    """(column, row) of the base and of each stage: one column after all that it uses, in the first free row,
    which is below the stages that hand on a policy for a reward model."""
    cells = {BASE: (0, 0)}
    columns = {BASE: 0}
    for stage in stages:
        columns[stage.name] = 1 + max(columns.get(name, 0) for name in (stage.init, *stage.reads))
    taken: dict[int, int] = {0: 1}
    for stage in sorted(stages, key=lambda stage: stage.type == REWARD):
        column = columns[stage.name]
        row = max(cells.get(stage.init, cells[BASE])[1], taken.get(column, 0))
        taken[column] = row + 1
        cells[stage.name] = (column, row)
    return cells


def _facts(stage: StageView) -> str:
    mark = MARKS.get(stage.state, "·")
    words = {"pending": "not started"}.get(stage.state, stage.state)
    time = f" · {duration(stage.seconds)}" if stage.seconds else ""
    return f"{mark} {words}{time}"


def _arrow(start: Box, end: Box, label: str) -> Arrow:
    """Arrow from a box's right side to another's left."""
    x0, y0 = start.x + start.width, start.y + start.height / 2
    x1, y1 = end.x - 3, end.y + end.height / 2
    middle = (x0 + x1) / 2
    path = f"M{x0:g} {y0:g} C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"
    return Arrow(path, label, middle, (y0 + y1) / 2 - 8, read=False)


def _read_arrow(start: Box, end: Box, label: str) -> Arrow:
    """Dashed, from below: where it crosses no arrow of a policy."""
    right, bottom = end.x + end.width / 2, end.y + end.height
    if start.y > end.y:
        x, y = start.x + start.width, start.y + start.height / 2
        path = f"M{x:g} {y:g} L{right - 30:g} {y:g} C{right:g} {y:g} {right:g} {y:g} {right:g} {bottom + 3}"
        return Arrow(path, label, (x + right) / 2, y - 7, read=True)
    left, top = start.x + start.width / 2, start.y + start.height
    low = max(top, bottom) + 22
    path = f"M{left:g} {top} C{left:g} {low} {left:g} {low} {left + 30:g} {low} L{right - 30:g} {low} "
    path += f"C{right:g} {low} {right:g} {low} {right:g} {bottom + 3}"
    return Arrow(path, label, (left + right) / 2, low - 5, read=True)


def artifact_text(stage: StageView) -> str:
    """Kind and size of what a stage passes on: `adapter, 1.3 MB`."""
    if not stage.artifact:
        return ""
    size = f", {byte_text(stage.artifact_bytes)}" if stage.artifact_bytes else ""
    return f"{stage.artifact.replace('_', ' ')}{size}"


def byte_text(count: float) -> str:
    """Bytes in decimal units: 812 kB, 1.3 MB, 61 GB."""
    if count < 1000:
        return f"{count:g} B"
    units = ("kB", "MB", "GB", "TB")
    power = min(len(units), int(math.log10(count)) // 3)
    return f"{count / 1000**power:.3g} {units[power - 1]}"


def short_path(text: str, limit: int = 24) -> str:
    """The end of a long path or id, so that it fits a box."""
    return text if len(text) <= limit else "…" + text[-(limit - 1) :]

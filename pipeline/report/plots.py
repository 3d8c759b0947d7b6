"""Draws the report's charts: curves over steps, as SVG and PNG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.report.figure import (
    COLOURS,
    SERIES,
    Drawing,
    drawing_style,
    file_name,
    label_width,
    labels_width,
    new_figure,
    place_labels,
    save,
)
from pipeline.report.panels import HELD_OUT, Chart, Unit, format_value
from pipeline.report.series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH_FROM = 40
"""From so many points on, the curve is a moving average over a pale line of the points themselves."""

WIDTH, HEIGHT = 3.75, 2.25
"""Inches of one chart; at 96 px an inch the size at which three fit a line of the report."""

HEADING_ROOM = 0.9
"""Share of a chart's width that title and labels may take on one line."""


@drawing_style()
def draw_chart(chart: Chart, stage: str, plots_dir: Path | None) -> Drawing:
    """Draw a stage's chart, also to `plots_dir/STAGE-TITLE.png`."""
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_axes((0.125, 0.15, 0.845, 0.66 - heading(figure, chart)))
    style_axes(axes, chart.panel.unit)
    if chart.stacked:
        plot_stack(axes, chart)
    else:
        # A schedule has no noise: an average would only round its corners.
        measured = "learning_rate" not in chart.panel.keys
        colours = curve_colours(chart)
        for label, series in chart.curves.items():
            plot_series(axes, series, colours[label], smooth=measured, dashed=is_twin(label))
    axes.margins(x=0.015, y=0.08)
    if chart.stacked:
        axes.set_ylim(0, axes.get_ylim()[1] or 1.0)
    axes.set_xlabel("step", loc="right", labelpad=1)
    name = f"{file_name(stage)}-{chart.slug}"
    return save(figure, plots_dir, name, chart.panel.title, first=chart.first)


def style_axes(axes: Axes, unit: Unit) -> None:
    """Quiet axes: horizontal hairlines, no box, few ticks."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(COLOURS["line"])
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=unit == "count"))
    if unit == "percent":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    elif unit == "scientific":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def scientific(value: float) -> str:
    """An axis label of a small number, as short as it gets: 2.5e-7, 0.004."""
    return re.sub(r"e([+-])0+", r"e\1", f"{value:.2g}") if value else "0"


def compact(value: float) -> str:
    """An axis label: 12k, 1.5M, 0.25."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):g}{suffix}"
    return f"{value:.4g}"


def is_twin(label: str) -> bool:
    """True for the held-out counterpart of another curve in a chart of several metrics."""
    return label.endswith(f" {HELD_OUT}")


def curve_colours(chart: Chart) -> dict[str, str]:
    """A colour a metric: the held-out figures of one of several share its colour, and are dashed."""
    labels = chart.colours_of or chart.curves
    metrics = dict.fromkeys(label.removesuffix(f" {HELD_OUT}") for label in labels)
    own = dict(zip(metrics, cycle(COLOURS[name] for name in SERIES)))
    return {label: own[label.removesuffix(f" {HELD_OUT}")] for label in chart.curves}


def plot_series(axes: Axes, series: Series, colour: str, *, smooth: bool, dashed: bool = False) -> None:
    """One curve: points as they are; many of them, if `smooth`, pale under their moving average."""
    line = "--" if dashed else "-"
    if len(series.values) == 1:
        axes.plot(series.steps, series.values, "o", color=colour, markersize=4.5)
        return
    if not smooth or len(series.values) < SMOOTH_FROM:
        marker = "o" if len(series.values) <= 15 else None
        axes.plot(
            series.steps, series.values, line, color=colour, linewidth=1.7, marker=marker, markersize=3.2
        )
        return
    axes.plot(series.steps, series.values, color=colour, linewidth=0.9, alpha=0.28)
    axes.plot(series.steps, moving_average(series.values), line, color=colour, linewidth=1.8)


def plot_stack(axes: Axes, chart: Chart) -> None:
    """Parts on top of each other, a step without one counting as 0, and a thin line for the total."""
    steps = sorted({step for series in chart.curves.values() for step in series.steps})
    if len(steps) == 1:
        axes.set_xticks(steps)
    # One step is a band too: half a step wide on each side.
    places = steps if len(steps) > 1 else [steps[0] - 0.5, steps[0] + 0.5]
    parts = []
    for series in chart.curves.values():
        known = dict(zip(series.steps, series.values))
        heights = [known.get(step, 0.0) for step in steps]
        parts.append(heights if len(steps) > 1 else heights * 2)
    axes.stackplot(
        places, parts, colors=[COLOURS[name] for name in SERIES[: len(parts)]], alpha=0.75, linewidth=0
    )
    if chart.total is not None and len(steps) > 1:
        axes.plot(chart.total.steps, chart.total.values, color=COLOURS["muted"], linewidth=0.9)


def moving_average(values: Sequence[float]) -> list[float]:
    """Centred mean over about a fifteenth of the points.

    At the start the window shrinks on both sides, so that the curve begins at the first value, as a loss
    must; at the end only the side that is missing is, so that the last point does not pull it.
    """
    half = max(2, len(values) // 30)
    means = []
    for at in range(len(values)):
        reach = min(half, at)
        near = values[at - reach : at + reach + 1]
        means.append(sum(near) / len(near))
    return means


def heading(figure: Figure, chart: Chart) -> float:
    """Title on the left; on the right the last value, or what each colour is when there are several.

    Labels that don't fit to the right of the title are written below it: the share of the height that this
    takes is returned."""
    ink, muted = COLOURS["ink"], COLOURS["muted"]
    figure.text(0.02, 0.915, chart.panel.title, size=9.5, weight="bold", color=ink, va="center")
    labels = list(chart.curves)
    if len(labels) == 1 and not chart.stacked:
        last = next(iter(chart.curves.values())).values[-1]
        text = format_value(last, chart.panel.unit)
        text += f" {HELD_OUT}" if labels[0] == HELD_OUT else ""
        figure.text(0.97, 0.915, text, size=9, color=muted, ha="right", va="center")
        return 0.0
    coloured = [(label, colour) for label, colour in curve_colours(chart).items() if not is_twin(label)]
    if any(is_twin(label) for label in labels):
        coloured.append((f"dashed, dots: {HELD_OUT}", muted))
    below = label_width(chart.panel.title, 9.5) + labels_width(coloured) > HEADING_ROOM * WIDTH
    coloured = fitting(coloured, 0.95 * WIDTH, muted)
    left = 0.02 * WIDTH if below else 0.97 * WIDTH - labels_width(coloured)
    place_labels(figure, coloured, left, 0.815 if below else 0.915)
    return 0.09 if below else 0.0


def fitting(labels: list[tuple[str, str]], room: float, muted: str) -> list[tuple[str, str]]:
    """As many labels as fit `room` inches, and the number of the others."""
    for kept in range(len(labels), 0, -1):
        more = [(f"+{len(labels) - kept}", muted)] if kept < len(labels) else []
        if labels_width(labels[:kept] + more) <= room:
            return labels[:kept] + more
    return labels[:1]

"""Draws the timeline: a lane per process, a colour per kind of work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.monitoring.printable import printable
from pipeline.report.figure import (
    COLOURS,
    SERIES,
    Drawing,
    drawing_style,
    labels_width,
    new_figure,
    place_labels,
    save,
)
from pipeline.report.plots import WIDTH, compact
from pipeline.report.timeline import KINDS, OTHER, Call, bars, shown_lanes, syncs, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANE_HEIGHT = 0.24
"""Inches of one lane."""

RESOLUTION = 1200
"""Calls of a kind that are closer than the window's length by this become one bar: about a pixel."""

MARKED_SYNCS = 20
"""Up to so many syncs are marked by a line each."""

COLOUR_OF = {**dict(zip(KINDS.values(), SERIES)), OTHER: "muted"}


@drawing_style()
def draw_timeline(calls: Sequence[Call], window: tuple[float, float], title: str, png: Path) -> Drawing:
    """Draw what each process did in a window (seconds since the epoch), across the page."""
    names = shown_lanes(calls)
    seen = within(calls, window)
    width, height = 3 * WIDTH, 0.85 + LANE_HEIGHT * len(names)
    figure = new_figure(width, height)
    left = 0.2 + 0.075 * max(len(name) for name in names)
    axes = figure.add_axes((left / width, 0.4 / height, 1 - (left + 0.15) / width, 1 - 0.85 / height))
    style_lanes(axes, names)
    for row, name in enumerate(names):
        draw_lane(axes, row, [call for call in seen if call.lane == name], window)
    ends = [end - window[0] for _, end in syncs(seen) if window[0] < end < window[1]]
    if len(ends) <= MARKED_SYNCS:
        for end in ends:
            axes.axvline(end, color=COLOURS["muted"], linewidth=0.6, linestyle=(0, (2, 3)), zorder=0)
    axes.set_xlim(0, (window[1] - window[0]) or 1.0)
    legend(figure, title, {call.kind for call in seen})
    return save(figure, png.parent, png.stem, title, wide=True)


def draw_lane(axes: Axes, row: int, calls: Sequence[Call], window: tuple[float, float]) -> None:
    """One process's bars: a collection for each kind, as single bars take seconds to draw."""
    gap = (window[1] - window[0]) / RESOLUTION
    joined = bars(calls, gap)
    for kind in dict.fromkeys(bar.kind for bar in joined):
        spans = []
        for bar in joined:
            start, end = max(bar.start, window[0]), min(bar.end, window[1])
            if bar.kind == kind:
                spans.append((start - window[0], max(end - start, gap)))
        colour, alpha = COLOURS[COLOUR_OF[kind]], 0.35 if kind == OTHER else 0.9
        axes.broken_barh(spans, (row - 0.36, 0.72), color=colour, alpha=alpha, linewidth=0)


def style_lanes(axes: Axes, names: Sequence[str]) -> None:
    """Lanes from top to bottom with a hairline each; seconds below."""
    from matplotlib.ticker import FuncFormatter

    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(COLOURS["line"])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [printable(name) for name in names])
    for row in range(len(names)):
        axes.axhline(row, color=COLOURS["line"], linewidth=0.8, zorder=0)
    axes.tick_params(length=0, pad=5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel("seconds", loc="right", labelpad=1)


def legend(figure: Figure, title: str, kinds: set[str]) -> None:
    """Title on the left, the kinds that occur on the right in their colours."""
    height = figure.get_figheight()
    line = 1 - 0.19 / height
    figure.text(0.025 / 3, line, title, size=9.5, weight="bold", color=COLOURS["ink"], va="center")
    labels = [(kind, COLOURS[name]) for kind, name in COLOUR_OF.items() if kind in kinds]
    place_labels(figure, labels, 0.99 * figure.get_figwidth() - labels_width(labels), line)

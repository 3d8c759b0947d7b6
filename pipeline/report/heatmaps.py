"""Draws the report's heatmaps: expert loads, and each layer's routing over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.report.figure import COLOURS, Drawing, drawing_style, file_name, new_figure, save
from pipeline.report.plots import HEIGHT, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.report.run_view import StageView

CELL_TEXT_EXPERTS, CELL_TEXT_LAYERS = 8, 12
"""Up to so many a heatmap's cells carry their value: more would be too small to read."""

STRENGTH = 0.7
"""Opacity of a cell at most, so that the figures in it stay readable on a light and on a dark page."""

LEAST_SPAN = 0.001
"""Agreements are coloured from the smallest found to 1, but over at least this much: where all routers nearly
agree, a tenth of a percent must not look like a disaster."""


def draw_heatmaps(stage: StageView, plots_dir: Path) -> list[Drawing]:
    """Draw all that a stage has data for: loads of trainer and engines, imbalance and agreement over
    steps."""
    routing, found = stage.routing, []
    if stage.router_load:
        title = "Expert load, trainer" if routing.engine_load else "Expert load"
        found.append(draw_load(stage.router_load, stage.name, title, plots_dir))
    if routing.engine_load:
        found.append(draw_load(routing.engine_load, stage.name, "Expert load, engines", plots_dir))
    if len(routing.steps) > 1:
        found.append(draw_imbalance(routing.busiest, routing.steps, stage.name, plots_dir))
    if routing.agreement:
        found.append(draw_agreement(routing.agreement, routing.agreement_steps, stage.name, plots_dir))
    return found


@drawing_style()
def draw_load(load: Sequence[Sequence[float]], stage: str, title: str, plots_dir: Path) -> Drawing:
    """Expert loads, [layer][expert] in fair shares: blue idle, orange overloaded.

    A small model's is as large as any chart and carries its figures; a large one's is `wide`.
    """
    from matplotlib.ticker import MaxNLocator

    layers, experts = len(load), len(load[0])
    wide = experts > CELL_TEXT_EXPERTS or layers > CELL_TEXT_LAYERS
    figure, axes = _frame(layers, wide)
    axes.imshow(load_colours(load), aspect="auto", interpolation="nearest")
    axes.set_xlabel("expert", loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    if not wide:
        for layer, row in enumerate(load):
            for expert, value in enumerate(row):
                text = f"{value:.1f}"
                axes.text(expert, layer, text, ha="center", va="center", size=7.5, color=COLOURS["ink"])
    busiest = max(value for row in load for value in row)
    return _finished(figure, stage, title, f"busiest {busiest:.2f} fair shares", plots_dir, wide)


@drawing_style()
def draw_imbalance(
    busiest: Sequence[Sequence[float]], steps: Sequence[int], stage: str, plots_dir: Path
) -> Drawing:
    """Load of each layer's busiest expert over the steps, [layer][step] in fair shares."""
    figure, axes = _frame(len(busiest), wide=len(busiest) > CELL_TEXT_LAYERS)
    axes.imshow(load_colours(busiest), aspect="auto", interpolation="nearest", extent=_extent(busiest))
    _step_ticks(axes, steps)
    last = max(row[-1] for row in busiest)
    fact = f"last {last:.2f} fair shares"
    return _finished(figure, stage, "Busiest expert", fact, plots_dir, len(busiest) > CELL_TEXT_LAYERS)


@drawing_style()
def draw_agreement(
    agreement: Sequence[Sequence[float]], steps: Sequence[int], stage: str, plots_dir: Path
) -> Drawing:
    """Share of engine choices that the trainer's routers share, [layer][step]: blank is all, orange least."""
    lowest = min(value for row in agreement for value in row)
    wide = len(agreement) > CELL_TEXT_LAYERS
    figure, axes = _frame(len(agreement), wide)
    image = agreement_colours(agreement, lowest)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=_extent(agreement))
    _step_ticks(axes, steps)
    fact = f"least {lowest:.2%}".replace("%", " %")
    return _finished(figure, stage, "Route agreement", fact, plots_dir, wide)


def load_colours(load: Sequence[Sequence[float]]) -> Any:
    """RGBA image of the loads. Balanced is transparent, so one image suits a light and a dark page."""
    import numpy as np

    values = np.asarray(load, dtype=float)
    over = np.clip(values - 1.0, 0.0, 1.0)
    under = np.clip(1.0 - values, 0.0, 1.0)
    image = np.zeros((*values.shape, 4))
    image[..., :3] = np.where((values >= 1.0)[..., None], _rgb(COLOURS["s2"]), _rgb(COLOURS["s1"]))
    image[..., 3] = STRENGTH * np.maximum(over, under)
    return image


def agreement_colours(agreement: Sequence[Sequence[float]], lowest: float) -> Any:
    """RGBA image: the stronger, the less is agreed upon, from `lowest` to 1."""
    import numpy as np

    values = np.asarray(agreement, dtype=float)
    image = np.zeros((*values.shape, 4))
    image[..., :3] = _rgb(COLOURS["s2"])
    image[..., 3] = STRENGTH * np.clip((1.0 - values) / max(1.0 - lowest, LEAST_SPAN), 0.0, 1.0)
    return image


def _frame(layers: int, wide: bool) -> tuple[Figure, Axes]:
    """Axes for `layers` rows, with room for a line of heading."""
    from matplotlib.ticker import MaxNLocator

    width, height = (3 * WIDTH, max(HEIGHT, 0.75 + 0.13 * layers)) if wide else (WIDTH, HEIGHT)
    figure = new_figure(width, height)
    left, bottom, top = 0.38 / width, 0.4 / height, 1 - 0.4 / height
    axes = figure.add_axes((left, bottom, 1 - left - 0.11 / width, top - bottom))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_ylabel("layer", labelpad=2)
    axes.tick_params(length=0, pad=3)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=min(layers, 12), integer=True))
    return figure, axes


def _extent(table: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """Left, right, bottom, top: a column a logged step, layers from above."""
    return (-0.5, len(table[0]) - 0.5, len(table) - 0.5, -0.5)


def _step_ticks(axes: Axes, steps: Sequence[int]) -> None:
    """Columns are logged steps, which may have gaps: each tick names its column's step."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def name(at: float, _: int) -> str:
        return str(steps[int(at)]) if at == int(at) and 0 <= at < len(steps) else ""

    axes.set_xlabel("step", loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(8, len(steps)), integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(name))


def _finished(figure: Figure, stage: str, title: str, fact: str, plots_dir: Path, wide: bool) -> Drawing:
    width, height = figure.get_size_inches()
    line = 1 - 0.19 / height
    figure.text(0.075 / width, line, title, size=9.5, weight="bold", color=COLOURS["ink"], va="center")
    figure.text(1 - 0.11 / width, line, fact, size=9 if wide else 8.5, ha="right", va="center")
    name = f"{file_name(stage)}-{file_name(title.lower().replace(',', ''))}"
    return save(figure, plots_dir, name, title, wide=wide)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))

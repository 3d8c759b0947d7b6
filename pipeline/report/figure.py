"""Settings and output of every figure: colours, and a PNG and an SVG of it.

The SVG's colours are those of the light theme, replaced by CSS variables of the same names, so that a chart
in a page follows its light or dark theme.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from actors.cluster import Scratch
from actors.errors import UserError
from pipeline.monitoring.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "surface": "#fdfdfc",
    "ink": "#20211f",
    "muted": "#67675f",
    "line": "#e2e2dc",
    "s1": "#2467bd",
    "s2": "#b5491a",
    "s3": "#0f7a56",
    "s4": "#8153ba",
    "s5": "#846300",
    "s6": "#4d6d81",
}
"""Light theme; style.css has a CSS variable of each name, for both themes."""

SERIES = tuple(name for name in COLOURS if re.fullmatch(r"s\d", name))
"""Names of the colours of curves, in the order in which they are given out."""

PNG_DPI = 160


@dataclass(frozen=True)
class Drawing:
    """One chart as an inline SVG."""

    title: str
    svg: str
    first: bool = True
    """Among the charts that answer "did it learn?"."""
    wide: bool = False
    """Takes the page's whole width."""


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """matplotlib's settings for every chart. UserError where matplotlib is not installed."""
    if "MPLCONFIGDIR" not in os.environ and not os.access(Path.home(), os.W_OK):
        # matplotlib otherwise complains about a home that it can't write to, as containers have.
        os.environ["MPLCONFIGDIR"] = str(Scratch().path)
    try:
        import matplotlib
    except ImportError:
        raise UserError("the report's plots need matplotlib: pip install matplotlib") from None
    muted = COLOURS["muted"]
    settings = {
        "svg.fonttype": "none",
        "font.family": ["DejaVu Sans"],
        "font.size": 8,
        "text.color": muted,
        # A dollar sign in a metric's name is not mathematics.
        "text.parse_math": False,
        "axes.labelcolor": muted,
        "xtick.color": muted,
        "ytick.color": muted,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The browser has the letters that the PNG's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches, outside of pyplot's windows and global state."""
    from matplotlib.figure import Figure as MatplotlibFigure

    return MatplotlibFigure(figsize=(width, height), facecolor=COLOURS["surface"])


LABEL_SIZE, LABEL_GAP = 8.5, 0.09
"""Points of a coloured label, and inches between two of them."""


def label_width(text: str, size: float = LABEL_SIZE) -> float:
    """Inches that a bold text takes in the PNG's font, which is wider than most that a browser picks."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", weight="bold", size=size)
    return float(TextPath((0, 0), text, prop=font).get_extents().width) / 72 if text.strip() else 0.0


def place_labels(figure: Figure, labels: Sequence[tuple[str, str]], left: float, height: float) -> None:
    """Write (text, colour) side by side from `left`, in inches; `height` is a share of the figure's."""
    for text, colour in labels:
        at = left / figure.get_figwidth()
        figure.text(at, height, text, size=LABEL_SIZE, color=colour, va="center", weight="bold")
        left += label_width(text) + LABEL_GAP


def labels_width(labels: Sequence[tuple[str, str]]) -> float:
    """Inches that `place_labels` takes."""
    return sum(label_width(text) + LABEL_GAP for text, _ in labels) - LABEL_GAP


def file_name(stage: str) -> str:
    """A stage's name as part of a file name and of an id."""
    return re.sub(r"[^\w-]+", "-", stage)


def replace_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically, by a file aside of this process's own."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save(
    figure: Figure,
    directory: Path | None,
    name: str,
    title: str,
    *,
    first: bool = True,
    wide: bool = False,
) -> Drawing:
    """Give the figure back as an SVG whose colours are CSS variables, and write it as `directory/NAME.png`;
    None: no PNG. `name` is another for each figure of a page."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        pixels = io.BytesIO()
        figure.savefig(pixels, format="png", dpi=PNG_DPI)
        replace_bytes(directory / f"{name}.png", pixels.getvalue())
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Drawing(title, themed_svg(buffer.getvalue(), name, title), first, wide)


def themed_svg(svg: str, prefix: str, title: str) -> str:
    """Prepare an SVG for embedding in a page: ids of its own, CSS variables for colours, a title for
    readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    # Ids must be unique in the page, but every chart has an axes_1.
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title, quote=True)}" ', 1)

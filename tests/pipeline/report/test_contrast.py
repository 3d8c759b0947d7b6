"""Contrast of every text of the report with what it stands on, by WCAG 2.2, success criterion 1.4.3 (AA)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import pipeline.report.build
from pipeline.report.figure import COLOURS
from pipeline.report.heatmaps import agreement_colours, load_colours

PACKAGE = Path(pipeline.report.build.__file__).parent
CSS = (PACKAGE / "style.css").read_text()
TEMPLATES = "".join(path.read_text() for path in PACKAGE.glob("*.html"))
TEXT_AT_LEAST = 4.5
"""Of text below 24 px, or below 18.7 px in bold."""
DRAWING_AT_LEAST = 3.0
"""Of lines and marks that carry a meaning (1.4.11)."""

LIGHT, DARK = (
    dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.S)
)
THEMES = {"light": LIGHT, "dark": DARK}
PAPERS = ("page", "surface", "sunken")
"""Colours that text stands on."""
WITHOUT_TEXT = re.compile(r"( i|::before| b|i\.startup)$")
"""Selectors of bars, points and hairlines."""

Rgb = tuple[float, float, float]


def rgb(colour: str) -> Rgb:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def contrast(one: Rgb, other: Rgb) -> float:
    """Ratio of relative luminances, as WCAG defines both."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    light = [
        float(weights @ [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour])
        for colour in (one, other)
    ]
    return (max(light) + 0.05) / (min(light) + 0.05)


def rules(css: str) -> list[tuple[str, str]]:
    """(selector, declarations) of every rule that is no theme."""
    flat = re.sub(r"/\*.*?\*/", "", re.sub(r"@media[^{]*\{", "", css), flags=re.S)
    return [(selector.strip(), body) for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", flat)]


def text_colours() -> set[str]:
    """Variables that colour any text: by the style sheet, by the templates, by the drawings."""
    bodies = [body for _, body in rules(CSS)] + re.findall(r'style="([^"]*)"', TEMPLATES)
    return {
        name for body in bodies for name in re.findall(r"(?:^|[;\s])(?:color|fill): var\(--(\w+)\)", body)
    }


def test_the_ratio_is_that_of_the_standard() -> None:
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert contrast(rgb("#777777"), (1, 1, 1)) == pytest.approx(4.48, abs=0.005)


def test_text_stands_on_the_three_papers_alone() -> None:
    for selector, body in rules(CSS):
        for name in re.findall(r"background: var\(--(\w+)\)", body):
            empty = all(WITHOUT_TEXT.search(one.strip()) for one in selector.split(","))
            assert name in PAPERS or empty, (selector, name)
        assert "opacity" not in body or WITHOUT_TEXT.search(selector), selector


@pytest.mark.parametrize("theme", THEMES)
def test_every_text_of_the_page_can_be_read(theme: str) -> None:
    colours = THEMES[theme]
    used = text_colours() - set(PAPERS)
    assert {"ink", "text", "muted", "s1", "good", "bad", "warn"} <= used
    ratios = {
        (text, paper): contrast(rgb(colours[text]), rgb(colours[paper])) for text in used for paper in PAPERS
    }
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < TEXT_AT_LEAST} == {}


def test_texts_of_the_drawings_have_colours_of_the_page(reported_run: Path, rlhf_run: Path) -> None:
    pipeline.report.build.build_report(rlhf_run)
    html = "".join((run / "report.html").read_text() for run in (reported_run, rlhf_run))
    drawn = re.findall(r"<text [^>]*style=\"[^\"]*?fill: ([^;\"]+)", html)
    assert {"var(--ink)", "var(--muted)", "var(--s1)", "var(--s2)"} <= set(drawn)
    names = {re.fullmatch(r"var\(--(\w+)\)", colour) for colour in drawn}
    assert None not in names, "a colour that no theme replaces"


@pytest.mark.parametrize("theme", THEMES)
def test_labels_and_curves_of_the_drawings_can_be_told_from_the_paper(theme: str) -> None:
    colours = THEMES[theme]
    series = [name for name in COLOURS if re.fullmatch(r"s\d", name)]
    for name in series:
        for paper in PAPERS:
            assert contrast(rgb(colours[name]), rgb(colours[paper])) >= TEXT_AT_LEAST, (name, paper)
    # Areas and bars are a little transparent.
    for name, alpha in [*((name, 0.75) for name in series), *((name, 0.9) for name in series)]:
        assert contrast(over(rgb(colours[name]), alpha, colours), rgb(colours["surface"])) >= DRAWING_AT_LEAST


def over(colour: Rgb, alpha: float, colours: dict[str, str]) -> Rgb:
    red, green, blue = (alpha * a + (1 - alpha) * b for a, b in zip(colour, rgb(colours["surface"])))
    return red, green, blue


@pytest.mark.parametrize("theme", THEMES)
def test_the_figures_in_a_heatmap_can_be_read_on_every_cell(theme: str) -> None:
    cells = [*load_colours([[0.0, 1.0, 9.0]])[0], *agreement_colours([[0.0, 1.0]], 0.0)[0]]
    for red, green, blue, alpha in cells:
        paper = over((red, green, blue), alpha, THEMES[theme])
        assert contrast(rgb(THEMES[theme]["ink"]), paper) >= TEXT_AT_LEAST


def test_the_drawings_have_the_colours_of_the_light_theme() -> None:
    assert {name: LIGHT[name] for name in COLOURS} == COLOURS

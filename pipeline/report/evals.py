"""Evaluations in the report: texts, tables, and comparison of each model with the one above. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.report.run_view import EvalRow


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


def headline(rows: Sequence[EvalRow]) -> str:
    """The result in one line: the figure of each model of the main table, in order."""
    main = next(iter(by_metric(rows).values()), [])
    if not main:
        return ""
    return f"{metric_name(main[0].metric)}: " + " → ".join(f"{row.model} {score_text(row)}" for row in main)


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
    # Rows of another evaluation would give a difference that contradicts the table.
    whole = len(earlier) == before.n and len(later) == row.n
    paired = paired_difference(earlier, later) if whole else None
    if paired is None:
        return f"{scale * (row.value - before.value):+{digits}}{unit}", ""
    low, high = scale * paired.low, scale * paired.high
    return f"{scale * paired.value:+{digits}}{unit} ({low:+{digits}} to {high:+{digits}})", paired.verdict


def by_metric(rows: Sequence[EvalRow]) -> dict[str, list[EvalRow]]:
    """Evaluations that can be compared, together; those of reward models last."""
    found: dict[str, list[EvalRow]] = {}
    for row in sorted(rows, key=lambda row: row.of_pairs):
        found.setdefault(row.metric, []).append(row)
    return found


def metric_name(metric: str) -> str:
    """A metric's name as words."""
    return metric.replace("_", " ")


def score_text(row: EvalRow) -> str:
    """`58.4 % exact match`-like: a share as percent, anything else as it is."""
    if is_share(row):
        return f"{100 * row.value:.1f} %"
    return f"{row.value:.4g}"


def interval_text(row: EvalRow) -> str:
    """A 95 % interval as text, empty where there is none."""
    if row.ci95 is None:
        return ""
    low, high = row.ci95
    return f"{100 * low:.1f} to {100 * high:.1f} %" if is_share(row) else f"{low:.4g} to {high:.4g}"


def is_share(row: EvalRow) -> bool:
    """True for a share of prompts (value and interval between 0 and 1)."""
    low, high = row.ci95 or (row.value, row.value)
    return min(low, row.value) >= 0 and max(high, row.value) <= 1


RESAMPLES = 4000
"""Moves the interval's ends by about 0.1 points from seed to seed with 500 prompts."""


@dataclass(frozen=True)
class Difference:
    """Mean score of the later model minus the earlier one's, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """better or worse where the interval leaves 0 out; even otherwise."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "even"


def paired_difference(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], seed: int = 0
) -> Difference | None:
    """Compare two models' rows {prompt, score}; None unless they answered the same prompts in the same order.

    Percentile bootstrap over prompts (Efron and Tibshirani 1993, chapter 13): resampling whole prompts
    keeps the two scores of a prompt together, so what is hard for both does not widen the interval.
    """
    if not before or [row.get("prompt") for row in before] != [row.get("prompt") for row in after]:
        return None
    pairs = [
        (float(a["score"]), float(b["score"]))
        for a, b in zip(before, after, strict=True)
        if isinstance(a.get("score"), (int, float)) and isinstance(b.get("score"), (int, float))
    ]
    if len(pairs) < 2:
        return None
    change = np.array([b - a for a, b in pairs])
    draws = np.random.default_rng(seed).integers(0, len(change), (RESAMPLES, len(change)))
    low, high = np.quantile(change[draws].mean(axis=1), [0.025, 0.975])
    return Difference(float(change.mean()), float(low), float(high))

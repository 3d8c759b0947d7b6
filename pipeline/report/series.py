"""A stage's logged metrics as curves, and expert loads as a table. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.report.tolerant_reading import as_number

LARGEST, MOST_STEPS = 1e60, 1e15
"""Of a figure, and of a step's number: far beyond what training makes (its floats end at 3e38), where the
ticks of an axis overflow or never end."""


@dataclass
class Series:
    """One metric over a stage's steps: `steps` ascending, one finite value each."""

    steps: list[int]
    values: list[float]

    @property
    def constant(self) -> bool:
        return len(set(self.values)) <= 1


def to_series(rows: list[dict[str, Any]]) -> dict[str, Series]:
    """Metric rows to one series a metric. A step logged again after a resume counts once, as last seen; what
    no chart can hold (`beyond`) is left out."""
    values: dict[str, dict[int, float]] = {}
    for index, row in enumerate(rows):
        step = as_number(row.get("step"))
        if step is not None and abs(step) > MOST_STEPS:
            continue
        at = index if step is None else int(step)
        for key, value in row.items():
            number = as_number(value)
            if key != "step" and number is not None and abs(number) <= LARGEST:
                values.setdefault(key, {})[at] = number
    return {
        key: Series(steps=sorted(points), values=[points[step] for step in sorted(points)])
        for key, points in values.items()
    }


def beyond(rows: list[dict[str, Any]]) -> int:
    """Number of figures, or of whole rows, that are too large for any chart."""
    numbers = [(key, number) for row in rows for key, value in row.items() if (number := as_number(value))]
    return sum(abs(number) > (MOST_STEPS if key == "step" else LARGEST) for key, number in numbers)


def fair_share(load: Any) -> list[list[float]]:
    """Expert loads as [layer][expert] multiples of the fair share; of [step][layer][expert] the last."""
    while isinstance(load, list) and load and _depth(load) > 2:
        load = load[-1]
    if not isinstance(load, list) or _depth(load) != 2:
        return []
    shares = []
    if not all(isinstance(row, list) for row in load):
        return []
    for row in load:
        numbers = [as_number(value) or 0.0 for value in row]
        total = sum(numbers)
        shares.append([value * len(numbers) / total if total else 0.0 for value in numbers])
    # Layers without experts (a dense first layer) are reported as empty rows.
    shares = [row for row in shares if row]
    return shares if len({len(row) for row in shares}) == 1 else []


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list):
        depth += 1
        value = next((item for item in value if item != []), None)
    return depth

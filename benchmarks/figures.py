"""Ratios with their aims: on the terminal as a table, and in a result file with the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import machine, write
from benchmarks.workloads import ROOT

RESULTS = ROOT / "benchmarks" / "results"
console = Console(width=130, highlight=False)


@dataclass(frozen=True)
class Ratio:
    """One comparison, a value a turn."""

    label: str
    values: Sequence[float]
    aim: float | None = None
    at_most: bool = False
    """The aim is an upper bound."""
    cpu: Sequence[float] = ()
    """The same ratio by CPU time."""

    @property
    def met(self) -> bool:
        value = median(self.values)
        return self.aim is None or (value <= self.aim if self.at_most else value >= self.aim)

    def entry(self) -> dict[str, Any]:
        """For the result file."""
        found = {
            "comparison": self.label,
            "ratio": round(median(self.values), 3),
            "ratio_min": round(min(self.values), 3),
            "ratio_max": round(max(self.values), 3),
            "turns": len(self.values),
        }
        if self.cpu:
            found["ratio_cpu_time"] = round(median(self.cpu), 3)
        if self.aim is not None:
            found |= {"aim": f"{'<=' if self.at_most else '>='} {self.aim:g}", "met": self.met}
        return found


class Execution:
    """One execution of a benchmark: the machine before it, and how long it took."""

    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick, self.began = name, quick, time.time()
        self.machine = machine()
        console.print(
            f"{name}: {self.machine['cpu']}, {self.machine['cores']} cores, "
            f"load {self.machine['load_average']}" + (", quick: figures mean nothing" if quick else "")
        )

    def end(self, ratios: Sequence[Ratio], **found: Any) -> None:
        """Print the ratios and the time; write `results/NAME.json`, or `NAME-quick.json`."""
        if ratios:
            show(ratios)
        minutes = round((time.time() - self.began) / 60, 1)
        path = RESULTS / f"{self.name}{'-quick' if self.quick else ''}.json"
        facts = {"machine": self.machine, "load_at_end": round(os.getloadavg()[0], 2), "minutes": minutes}
        write(path, {**facts, "summary": [ratio.entry() for ratio in ratios], **found})
        console.print(f"{minutes} minutes; {path.relative_to(ROOT)}")


def show(ratios: Sequence[Ratio]) -> None:
    """The ratios as a table."""
    table = Table(title="Ratios, medians of turns")
    table.add_column("comparison")
    for column in ("ratio", "min - max", "by CPU time", "aim"):
        table.add_column(column, justify="right")
    for ratio in ratios:
        colour = "green" if ratio.met else "red"
        aim = "" if ratio.aim is None else f"{'<=' if ratio.at_most else '>='} {ratio.aim:g}"
        table.add_row(
            ratio.label,
            f"[{colour}]{median(ratio.values):.2f}[/]",
            f"{min(ratio.values):.2f} - {max(ratio.values):.2f}",
            f"{median(ratio.cpu):.2f}" if ratio.cpu else "",
            aim,
        )
    console.print(table)


def rows(title: str, columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    """Any other table; the first column is text."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(*[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in line])
    console.print(table)

"""metrics.jsonl of a stage: one line a logged step, cut back to the checkpoint when a run goes on."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts.json_text import json_text
from pipeline.artifacts.manifest import disk_errors, replace_text

LAST = ("learning_rate", "num_tokens", "epoch", "step", "sync/version", "beta")
"""Metrics of which a logging window keeps the last value; of the others it keeps the mean."""


WINDOW = "logging_window.json"
"""File of a checkpoint with the steps that are in no logged line yet."""


class MetricsLog:
    """Appends windows of steps to a file and hands each line on."""

    def __init__(self, path: Path, *, resume_at: int, every: int, checkpoint: Path | None = None) -> None:
        """`checkpoint`: what a run goes on from; the window that was open then is open again."""
        self.path, self.every = path, every
        self._window: list[Mapping[str, float]] = []
        if resume_at and checkpoint is not None and (checkpoint / WINDOW).is_file():
            window = json.loads((checkpoint / WINDOW).read_text())
            self._window = [{name: as_metric(value) for name, value in one.items()} for one in window]
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= resume_at] if resume_at else []
        # Days of training are in this file: it is never emptied to be written again.
        with disk_errors(path, "write metrics"):
            replace_text(path, "".join(json_text(line) + "\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")
        self._evaluated = {line["step"] for line in kept if any(name.startswith("eval_") for name in line)}
        last = kept[-1] if kept else {}
        self.last: dict[str, Any] = {name: value for name, value in last.items() if value is not None}

    def add(self, step: int, metrics: Mapping[str, float], *, final: bool = False) -> dict[str, Any] | None:
        """Take in one step; returns the line where a window closes, else None."""
        self._window.append(metrics)
        if step % self.every and not final:
            return None
        names = dict.fromkeys(name for one in self._window for name in one)
        line: dict[str, Any] = {"step": step}
        for name in names:
            values = [one[name] for one in self._window if name in one]
            line[name] = values[-1] if name in LAST else sum(values) / len(values)
        self._window.clear()
        return self.write(line)

    def evaluated(self, step: int) -> bool:
        """True if the file had a line of an evaluation after this step when it was opened."""
        return step in self._evaluated

    def save(self, directory: Path) -> None:
        """Write the steps that are in no line yet."""
        if self._window:
            (directory / WINDOW).write_text(json_text(self._window))

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append one line as it stands; what is no finite number is null in the file."""
        with disk_errors(self.path, "write metrics"):
            self._file.write(json_text(line) + "\n")
            self._file.flush()
        self.last.update(line)
        return line

    def close(self) -> None:
        with contextlib.suppress(OSError):  # Of a line that `write` could not write.
            self._file.close()


def as_metric(value: float | None) -> float:
    """A metric of a file: null stands for one that was no finite number."""
    return math.nan if value is None else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file that are whole: what a kill cut short or a disk damaged is left out."""
    if not path.is_file():
        return []
    found = [_row(line) for line in path.read_bytes().split(b"\n")]
    return [row for row in found if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int | float) else None

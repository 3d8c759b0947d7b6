"""A run that losses are caused in, and what is noted of each of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts.manifest import file_digest
from tests.chaos.observe import Lengths, Life, Tail
from tests.whole_runs.test_online import UNEQUAL


@dataclass
class Outcome:
    """One line of the table."""

    cell: str
    verdict: str = ""
    """`in place`, `ended` (and then gone on from its last checkpoint), `hung`, `went on`, `not hit`."""
    step: int = 0
    """Steps logged at the moment."""
    hit: bool = False
    """The call was under way when the signal was sent."""
    code: int | None = None
    said: str = ""
    """The first line of the run about it, or its last ones where it ended."""
    named: bool = False
    """It is told whose process was lost."""
    detection_s: float | None = None
    recovery_s: float | None = None
    """From the loss, or from the next start of a run that had ended, to the end of the first further step."""
    loading_s: float | None = None
    """Of that, building and loading."""
    steps_lost: int = 0
    equal: bool | None = None
    """Every repeatable metric up to the second step after it, and checkpoints, are an undisturbed run's."""
    left: dict[str, list[str]] = field(default_factory=dict)
    when: str = ""

    def text(self) -> str:
        parts = [f"{self.cell}: {self.verdict}"]
        parts += [f"exit {self.code}"] if self.code is not None else []
        parts += [f"seen after {self.detection_s:.1f} s"] if self.detection_s is not None else []
        parts += [f"next step after {self.recovery_s:.1f} s"] if self.recovery_s is not None else []
        parts += [f"{self.steps_lost} steps lost"]
        parts += [] if self.equal is None else ["equal" if self.equal else "NOT EQUAL"]
        parts += [f"left: {self.left}"] if any(self.left.values()) else []
        return ", ".join(parts)

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Scene:
    """A run that cells are played on, and the undisturbed one that it is compared with."""

    name: str
    stage: str
    make: Callable[[Path], list[str]]
    """Writes the config for a directory and says the command."""
    directory: Path
    temporary: Path
    patience: float
    before: Callable[[], None] = lambda: None
    """What has to be in place before each cell."""
    whole: Path | None = None
    lengths: Lengths | None = None
    number: int = 0
    life: Life | None = None

    @property
    def place(self) -> Path:
        return self.directory / f"{self.name}-{self.number}"

    @property
    def run(self) -> Path:
        return self.place / "run"

    @property
    def metrics(self) -> Path:
        return self.run / self.stage / "metrics.jsonl"

    def begin(self) -> Life:
        """Start the run, or let it go on."""
        assert self.life is None
        self.life = Life(self.make(self.place), self.place, self.run, self.temporary)
        return self.life

    def finish(self) -> None:
        """End what runs of it."""
        if self.life is not None:
            self.life.end()
            self.life = None

    def anew(self) -> None:
        """A directory of its own for the next life."""
        self.finish()
        self.number += 1

    def lines(self, run: Path | None = None) -> list[dict[str, Any]]:
        rows = Tail((run or self.run) / self.stage / "metrics.jsonl").rows()
        return [{k: v for k, v in row.items() if not UNEQUAL.match(k)} for row in rows]

    def first_difference(self) -> str | None:
        """The first metric or checkpoint that the undisturbed run has otherwise."""
        assert self.whole is not None
        for ours, theirs in zip(self.lines(), self.lines(self.whole), strict=False):
            if ours != theirs:
                names = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
                return f"step {ours['step']}: {', '.join(sorted(names)[:4])}"
        stage = self.whole / self.stage
        for theirs in [*stage.glob("adapter/*.safetensors"), *stage.glob("model/*.safetensors")]:
            ours = self.run / theirs.relative_to(self.whole)
            if ours.is_file() and file_digest(ours) != file_digest(theirs):
                return f"the final {theirs.parent.name}"
        return None


def saved(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write the results so far."""
    path.with_suffix(".tmp").write_text(json.dumps(rows, indent=1))
    os.replace(path.with_suffix(".tmp"), path)

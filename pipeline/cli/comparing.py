"""Runs `raylign compare`: short tables on the screen, and a page with the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.errors import EXIT_DONE, UserError
from pipeline.monitoring import console
from pipeline.monitoring.progress import working

SHOWN = 15
"""Lines of a table on the screen; the page has all."""


def compare_runs(directories: Sequence[Path], out: Path) -> int:
    """Print what differs between runs, and write the page about them.

    Raises:
        UserError: a directory that is no run, the same one twice, or a page that can't be written.
    """
    try:
        with working("reading the runs, and drawing"):
            from pipeline.report import read_runs, write_page

            found = read_runs(directories)
            written = write_page(found, out)
    except OSError as error:
        raise UserError(f"--out {out}: can't be written ({error.strerror or error})") from None
    for note in found.notes:
        console.say(note)
    _beside("Settings that differ", found.settings, found.labels)
    if not found.settings and all(run.config for run in found.runs):
        console.say("no setting differs but the names of the runs and their directories")
    _beside("Evaluation", found.evaluations, found.labels)
    for stage in found.stages:
        rows = [("state", stage.states), *stage.figures[: stage.main or len(stage.figures)]]
        _beside(f"{stage.name}: last figures", rows, found.labels)
    console.say(f"wrote {written}")
    return EXIT_DONE


def _beside(title: str, rows: Sequence[tuple[str, list[str]]], labels: Sequence[str]) -> None:
    shown = [[name, *texts] for name, texts in rows[:SHOWN]]
    console.table(title, ["", *labels], shown)
    if len(rows) > SHOWN:
        console.say(f"and {len(rows) - SHOWN} more, on the page")

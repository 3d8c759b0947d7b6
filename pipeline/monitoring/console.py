"""Output of the commands: problems without tracebacks, and small tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import IO, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.errors import EXIT_FAILED, EXIT_USER, RunFailure, UserError
from pipeline.monitoring.lasting_output import LastingOutput
from pipeline.monitoring.printable import PrintableConsole, printable

WIDTH = 120
"""Columns where there is no terminal to ask: a table in a log or pipe is not folded at 80."""


def console_for(stderr: bool, *, lasting: bool = False) -> Console:
    """A console as wide as the terminal, `WIDTH` where there is none; text can't act on it.

    `lasting`: its reader may go away, and printing goes on into nothing.
    """
    out = sys.stderr if stderr else sys.stdout
    terminal = out.isatty()
    width = None if terminal else WIDTH
    file = cast("IO[str]", LastingOutput(out)) if lasting else None
    return PrintableConsole(file=file, stderr=stderr, highlight=False, soft_wrap=not terminal, width=width)


out, err = console_for(stderr=False), console_for(stderr=True)


def say(text: str) -> None:
    """One line on standard output, as it is."""
    out.print(text, markup=False)


def user_error(error: UserError, subject: str = "") -> int:
    """Print every problem on a line of its own; exit code 2."""
    count = len(error.problems)
    if count == 1 and (not subject or error.problems[0].startswith(subject)):
        err.print(f"[bold red]error[/]: {escape(error.problems[0])}")
        return EXIT_USER
    head = f"{subject}: " if subject else ""
    err.print(f"[bold red]{escape(head)}{count} problem{'s' if count != 1 else ''}[/]")
    for problem in error.problems:
        key, colon, rest = problem.partition(": ")
        is_key = bool(colon) and " " not in key
        text = f"[bold]{escape(key)}[/]: {escape(rest)}" if is_key else escape(problem)
        err.print(f"  - {text}")
    return EXIT_USER


def run_failure(error: RunFailure) -> int:
    """Print who failed, phase, reason and next step; exit code 1."""
    err.print(f"[bold red]failed[/]: {escape(str(error))}")
    return EXIT_FAILED


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a small table; nothing when it has no rows."""
    filled = [[str(cell) for cell in row] for row in rows]
    if not filled:
        return
    grid = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2)
    )
    for name in columns:
        grid.add_column(name, style="", header_style="dim", overflow="fold")
    for row in filled:
        grid.add_row(*(escape(printable(cell)) for cell in row))
    out.print(grid)

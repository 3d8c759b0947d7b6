"""Errors that end a command (a user's mistake, a failure at run time), and the exit codes of the program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL: stopped by a signal after saving; the same command goes on from there."""
EXIT_INTERRUPTED = 130
"""Stopped by a signal, with nothing saved."""

AGAIN = "run the same command again: it goes on from the last checkpoint"
"""Next step after most failures at run time."""


class UserError(Exception):
    """A mistake of the user's, with every violation found, never only the first.

    Each problem names the key, file or row, the value, and what would be right. The command line
    prints them without a traceback and exits with `EXIT_USER`; nothing has been started.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[str]]]:
        return type(self), (self.problems,)


def attempt(
    problems: list[str], where: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T | None:
    """Result of an action; or None, and what is wrong added to `problems`, with the key `where` (empty: none)
    before each problem that doesn't name it."""
    try:
        return action(*args, **kwargs)
    except UserError as error:
        problems += [p if where in p else f"{where}: {p}" for p in error.problems]
        return None


class RunFailure(Exception):
    """A failure at run time: who failed, in which phase, for what reason, and what to do next."""

    def __init__(self, who: str, phase: str, reason: str, next_step: str = "") -> None:
        self.who, self.phase, self.reason, self.next_step = who, phase, reason, next_step
        super().__init__(who, phase, reason, next_step)

    def __str__(self) -> str:
        text = f"{self.who} failed in phase '{self.phase}': {self.reason}"
        return f"{text}\n  next: {self.next_step}" if self.next_step else text


class LinkFailure(RunFailure):
    """A connection failed: nothing is said of whoever is at its ends."""


class NoRoom(RunFailure):
    """No node has room for a process whose node died; trying again at once would not help."""


class InvariantViolation(RunFailure):
    """A known invariant did not hold (first DPO loss = ln 2, frozen weights unmoved, ...)."""

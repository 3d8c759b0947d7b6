"""One violation of a run's config, as rules find it and messages tell it."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One violation: the dotted key it belongs to, and what to do."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message

    def within(self, section: str) -> Problem:
        """The same violation, its key seen from outside `section`."""
        return Problem(f"{section}.{self.path}", self.message)

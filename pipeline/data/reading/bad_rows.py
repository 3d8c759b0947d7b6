"""Rows that can't be used: reasons, places, and their messages to the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from actors.errors import UserError

MISSING_COLUMN = "missing column"
WRONG_TYPE = "wrong type"
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not valid JSON"
TOO_DEEP = "nested too deeply"
HEADER_AGAIN = "the header a second time"
EMPTY_PROMPT = "empty prompt"
EMPTY_ANSWER = "empty answer"
NO_ANSWER = "no answer by the assistant"
SAME_ANSWERS = "chosen equal to rejected"
UNKNOWN_ROLE = "unknown role"
TWO_SYSTEMS = "two system prompts"
NOT_TRAINED = "nothing to train on"
PROMPTS_DIFFER = "chosen and rejected answer different prompts"
OTHER_PROMPT = "the answer holds another prompt"
TEMPLATE_REFUSED = "refused by the chat template"
LEFT_OUT = "left out by the chat template"
PROMPT_CHANGES = "changed by the chat template when the answer follows"
RENDERED_ALREADY = "rendered by a chat template already"
CONTROL_TOKEN = "holds a control token of the chat template"
BEYOND_EMBEDDING = "a token without a row in the base's embedding"
TOO_LONG = "longer than max_length"
PROMPT_FILLS = "prompt fills max_length"

LISTED = 20
"""Rows listed one by one; the rest is counted. A screenful: beyond it nobody reads on."""


class RowProblem(Exception):
    """Raised while a row is converted; `reason` is one of this module's constants."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class BadRow:
    """One row that can't be used. `number` counts from 1: a line of a jsonl file, a row elsewhere."""

    file: str
    number: int
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.file} row {self.number}: {self.reason}{detail}"


@dataclass
class Skipped:
    """Rows that were left out: exact counts by reason, and the first `LISTED` of them."""

    counts: Counter[str] = field(default_factory=Counter)
    listing: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        self.counts[row.reason] += 1
        if len(self.listing) < LISTED:
            self.listing.append(row)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def summary(self) -> str:
        """For example `3 rows: 2 empty answer, 1 wrong type`; empty when nothing was left out."""
        if not self.counts:
            return ""
        parts = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
        return f"{self.total} row{'s' if self.total > 1 else ''}: {parts}"

    @staticmethod
    def merged(parts: Iterable[Skipped]) -> Skipped:
        """The sum of several."""
        result = Skipped()
        for part in parts:
            result.counts.update(part.counts)
            result.listing.extend(part.listing[: LISTED - len(result.listing)])
        return result


class RowGate:
    """Sorts bad rows by their source's `on_bad_row`: skipped and counted, or an error at the end.

    Nothing is raised before `close`, so that the user sees every bad row of every source at once.
    """

    def __init__(self) -> None:
        self.skipped = Skipped()
        self.refused = Skipped()

    def add(self, row: BadRow, on_bad_row: str) -> None:
        (self.skipped if on_bad_row == "skip" else self.refused).add(row)

    def problems(self) -> list[str]:
        """One line a refused row (capped), then how many more there are and what can be done."""
        if not self.refused.total:
            return []
        lines = [str(row) for row in self.refused.listing]
        more = self.refused.total - len(lines)
        if more:
            lines.append(f"... and {more} more rows ({self.refused.summary()})")
        lines.append("correct these rows, or set `on_bad_row: skip` on their source to leave them out")
        return lines

    def close(self) -> Skipped:
        """The rows that were skipped. Raises UserError when rows were refused."""
        if problems := self.problems():
            raise UserError(problems)
        return self.skipped

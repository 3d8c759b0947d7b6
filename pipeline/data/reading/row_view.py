"""Access to a raw row's columns by canonical name, as strings and message lists."""

from __future__ import annotations

from typing import Any

from pipeline.data.reading.bad_rows import EMPTY_ANSWER, MISSING_COLUMN, WRONG_TYPE, RowProblem
from pipeline.data.reading.field_values import type_name
from pipeline.data.reading.messages import (
    Message,
    assistant,
    in_turns,
    is_json_messages,
    messages_of,
    text_of,
)
from pipeline.data.reading.training_flags import Flag


class RowView:
    """A raw row seen through its layout's columns; access raises RowProblem."""

    def __init__(self, values: dict[str, Any], columns: dict[str, str], arrow: bool = False) -> None:
        self._values, self._columns, self.arrow = values, columns, arrow
        self.flags: list[Flag] = []
        """Training flags of the messages read so far."""

    def name(self, canonical: str) -> str:
        """The column that holds `canonical`, for messages."""
        return self._columns.get(canonical, canonical)

    def get(self, canonical: str) -> Any:
        """The value, None where the column or its value is missing."""
        column = self._columns.get(canonical)
        return None if column is None else self._values.get(column)

    def need(self, canonical: str) -> Any:
        """The value of a needed column."""
        value = self.get(canonical)
        if value is None:
            column = self.name(canonical)
            raise RowProblem(MISSING_COLUMN, f"{column} is null" if column in self._values else column)
        return value

    def text(self, canonical: str, empty: str) -> str:
        """A needed string that is not blank; `empty` is the reason given when it is."""
        return text_of(self.need(canonical), self.name(canonical), empty)

    def messages(self, canonical: str) -> list[Message]:
        """A needed message list, in (role, content) form."""
        value = self.need(canonical)
        if canonical in ("messages", "conversations"):
            value = in_turns(value)
        return self.read(value, self.name(canonical))

    def read(self, value: Any, where: str) -> list[Message]:
        """`value` as messages."""
        return messages_of(value, where, self.flags, self.arrow)

    def answer(self, canonical: str) -> list[Message]:
        """A needed answer: a string becomes one assistant message."""
        value = self.need(canonical)
        if isinstance(value, str) and not is_json_messages(value):
            return [assistant(text_of(value, self.name(canonical), EMPTY_ANSWER))]
        check_text_or_messages(value, self.name(canonical))
        return self.read(value, self.name(canonical))


def check_text_or_messages(value: Any, column: str) -> None:
    """Refuse what is neither text nor messages."""
    if not isinstance(value, str | list | dict):
        raise RowProblem(WRONG_TYPE, f"{column} is {type_name(value)}, not a string or a list of messages")

"""A raw row read by its columns: strings and message lists, or the reason why it can't be used."""

from __future__ import annotations

import json
from typing import Any

from pipeline.data.bad_rows import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    MISSING_COLUMN,
    NOT_UTF8,
    WRONG_TYPE,
    RowProblem,
)

Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}


class RowView:
    """A raw row seen through its layout's columns; access raises RowProblem."""

    def __init__(self, values: dict[str, Any], columns: dict[str, str]) -> None:
        self._values, self._columns = values, columns

    def get(self, canonical: str) -> Any:
        """The value, None where the column or its value is missing."""
        column = self._columns.get(canonical)
        return None if column is None else self._values.get(column)

    def need(self, canonical: str) -> Any:
        """The value of a needed column."""
        value = self.get(canonical)
        if value is None:
            column = self._columns.get(canonical, canonical)
            raise RowProblem(MISSING_COLUMN, f"{column} is null" if column in self._values else column)
        return value

    def text(self, canonical: str, empty: str) -> str:
        """A needed string that is not blank; `empty` is the reason given when it is."""
        return text_of(self.need(canonical), self._columns.get(canonical, canonical), empty)

    def messages(self, canonical: str) -> list[Message]:
        """A needed message list, in (role, content) form."""
        return messages_of(self.need(canonical), self._columns.get(canonical, canonical))

    def answer(self, canonical: str) -> list[Message]:
        """A needed answer: a string becomes one assistant message."""
        value = self.need(canonical)
        if isinstance(value, str) and not is_json_messages(value):
            return [assistant(text_of(value, self._columns[canonical], EMPTY_ANSWER))]
        check_text_or_messages(value, self._columns[canonical])
        return messages_of(value, self._columns[canonical])


def check_text_or_messages(value: Any, column: str) -> None:
    """Refuse what is neither text nor messages."""
    if not isinstance(value, str | list | dict):
        raise RowProblem(WRONG_TYPE, f"{column} is {_type(value)}, not a string or a list of messages")


def text_of(value: Any, column: str, empty: str) -> str:
    """`value` as text that is not blank and can be encoded; `empty` is the reason given when it is blank."""
    if not isinstance(value, str):
        raise RowProblem(WRONG_TYPE, f"{column} is {_type(value)}, not a string")
    if not value.strip():
        raise RowProblem(empty, column)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowProblem(NOT_UTF8, f"{column} at character {error.start}") from error
    return value


def _type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        int: "a number",
        float: "a number",
        bool: "true/false",
        bytes: "bytes",
    }
    return names.get(type(value), type(value).__name__)


def assistant(content: str) -> Message:
    """A turn of the assistant."""
    return {"role": "assistant", "content": content}


def user(content: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": content}


def is_json_messages(value: str) -> bool:
    """Whether a string looks like a message list that was written out as JSON."""
    return value.startswith("[{") and value.rstrip().endswith("}]")


def messages_of(value: Any, column: str) -> list[Message]:
    """`value` as messages in (role, content) form."""
    if isinstance(value, str) and is_json_messages(value):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowProblem(WRONG_TYPE, f"{column} is a string, not a list of messages") from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowProblem(WRONG_TYPE, f"{column} is {_type(value)}, not a list of messages")
    if not value:
        raise RowProblem(EMPTY_PROMPT, f"{column} is an empty list")
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RowProblem(WRONG_TYPE, f"{where} is {_type(item)}, not a message")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if not isinstance(role, str):
        raise RowProblem(WRONG_TYPE, f"{where} has no role")
    rest = {
        k: v
        for k, v in item.items()
        if k not in ("role", "from", "content", "value", "weight") and v is not None
    }
    if isinstance(content, list):
        content = _joined_parts(content, where)
    if content is None and rest.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowProblem(WRONG_TYPE, f"{where}.content is {_type(content)}, not a string")
    if content.strip():
        text_of(content, f"{where}.content", EMPTY_PROMPT)
    return {"role": _ROLES.get(role, role), "content": content, **rest}


def _joined_parts(parts: list[Any], where: str) -> str:
    if not all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
    ):
        raise RowProblem(WRONG_TYPE, f"{where}.content has parts that are not text")
    return "".join(p["text"] for p in parts)

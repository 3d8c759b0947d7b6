"""One raw row -> messages, by the converter of its layout; what no layout allows is refused here."""

from __future__ import annotations

from typing import Any

from pipeline.data import converters, pair_converters
from pipeline.data.bad_rows import EMPTY_ANSWER, EMPTY_PROMPT, NO_ANSWER, SAME_ANSWERS, RowProblem
from pipeline.data.converters import Converted
from pipeline.data.layouts import Resolved
from pipeline.data.row_view import Message, RowView, text_of

_CONVERTERS = {**converters.BY_LAYOUT, **pair_converters.BY_LAYOUT}


def convert(values: dict[str, Any], resolved: Resolved) -> Converted:
    """Messages of one row. RowProblem when the row can't be used."""
    row = RowView(values, resolved.columns)
    converted = _CONVERTERS[resolved.layout.name](row)
    converted = _with_system(converted, row.get("system"))
    for answer in converted.answers:
        _check_answer(answer)
    if len(converted.answers) == 2 and _same(*converted.answers):
        raise RowProblem(SAME_ANSWERS)
    return converted


def _check_answer(answer: list[Message]) -> None:
    turns = [m for m in answer if m["role"] == "assistant"]
    if not turns:
        raise RowProblem(NO_ANSWER)
    if not any(m["content"].strip() or m.get("tool_calls") for m in turns[-1:]):
        raise RowProblem(EMPTY_ANSWER)


def _same(chosen: list[Message], rejected: list[Message]) -> bool:
    def stripped(messages: list[Message]) -> list[Message]:
        return [{**m, "content": m["content"].strip()} for m in messages]

    return stripped(chosen) == stripped(rejected)


def _with_system(converted: Converted, system: Any) -> Converted:
    if system is None or system == "":
        return converted
    text = text_of(system, "system", EMPTY_PROMPT)
    message = {"role": "system", "content": text}
    plain = converted.plain and (f"{text}\n\n{converted.plain[0]}", *converted.plain[1:])
    if converted.prompt:
        return Converted([message, *converted.prompt], converted.answers, plain)
    return Converted([], tuple([message, *answer] for answer in converted.answers), plain)

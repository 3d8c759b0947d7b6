"""Converts one raw row to messages, by its layout's converter, and refuses what no layout allows."""

from __future__ import annotations

from typing import Any

from pipeline.data.reading.bad_rows import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    NO_ANSWER,
    SAME_ANSWERS,
    TWO_SYSTEMS,
    WRONG_TYPE,
    RowProblem,
)
from pipeline.data.reading.field_values import from_json, is_blank
from pipeline.data.reading.layout_converters import BY_LAYOUT, Converted
from pipeline.data.reading.layouts import Kind, Resolved
from pipeline.data.reading.messages import Message, assistant, text_of, user
from pipeline.data.reading.raw_rows import Row
from pipeline.data.reading.row_view import RowView
from pipeline.data.reading.training_flags import check_whole, untrained_turns


def convert(raw: Row, resolved: Resolved, kind: Kind) -> Converted:
    """Messages of one row, for a stage of this kind. RowProblem when the row can't be used."""
    row = RowView(raw.values, resolved.columns, raw.arrow)
    converted = BY_LAYOUT[resolved.layout.name](row)
    converted = _with_system(_with_history(converted, row), row)
    if kind == "prompt" and _is_question(converted):
        return Converted(converted.answers[0], (), None)
    for answer in converted.answers:
        _check_answer(answer)
    if len(converted.answers) == 2 and _same(*converted.answers):
        raise RowProblem(SAME_ANSWERS)
    if kind == "sft":
        left_out = untrained_turns(row.flags, converted.prompt, converted.answers[0])
        return converted._replace(untrained=left_out) if left_out else converted
    if kind != "prompt":
        check_whole(row.flags, converted.answers)
    return converted


def _is_question(converted: Converted) -> bool:
    """True for a conversation that ends with a question: all of it is the prompt."""
    return (
        not converted.prompt and bool(converted.answers) and converted.answers[0][-1]["role"] != "assistant"
    )


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


def _with_system(converted: Converted, row: RowView) -> Converted:
    """The row with the system column's turn in front, unless its messages begin with the same one."""
    system = row.get("system")
    if is_blank(system):
        return converted
    text = text_of(system, row.name("system"), EMPTY_PROMPT).removeprefix("SYSTEM: ")  # glaive's mark
    first = (converted.prompt or converted.answers[0])[0]
    if first["role"] == "system":
        if first["content"].strip() == text.strip():
            return converted
        raise RowProblem(
            TWO_SYSTEMS,
            f"column {row.name('system')} says {_short(text)}, the messages begin with "
            f"{_short(first['content'])}",
        )
    message = {"role": "system", "content": text}
    plain = converted.plain and (f"{text}\n\n{converted.plain[0]}", *converted.plain[1:])
    if converted.prompt:
        return Converted([message, *converted.prompt], converted.answers, plain)
    return Converted([], tuple([message, *answer] for answer in converted.answers), plain)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _with_history(converted: Converted, row: RowView) -> Converted:
    """The row with earlier turns in front, as Alpaca's `history` holds them; they belong to the prompt."""
    where = row.name("history")
    history = from_json(row.get("history"), where)
    if not history:
        return converted
    if not converted.prompt or converted.prompt[0]["role"] != "user" or len(converted.prompt) > 1:
        raise RowProblem(WRONG_TYPE, f"{where} stands beside a prompt that is a conversation itself")
    return Converted([*_history(history, where, row), *converted.prompt], converted.answers, None)


def _history(history: Any, where: str, row: RowView) -> list[Message]:
    if isinstance(history, list) and isinstance(history[0], dict):
        messages = row.read(history, where)
        if messages[-1]["role"] == "user":
            raise RowProblem(WRONG_TYPE, f"{where} ends with a question")
        return messages
    if not isinstance(history, list) or not all(isinstance(x, list) and len(x) == 2 for x in history):
        raise RowProblem(WRONG_TYPE, f"{where} is not a list of [question, answer] pairs")
    messages = []
    for index, (question, answer) in enumerate(history):
        messages.append(user(text_of(question, f"{where}[{index}][0]", EMPTY_PROMPT)))
        messages.append(assistant(text_of(answer, f"{where}[{index}][1]", EMPTY_ANSWER)))
    return messages

"""Conversations written out as one text: glaive-function-calling's `USER: ... ASSISTANT: ...`."""

from __future__ import annotations

import re
from collections.abc import Callable

from pipeline.data.bad_rows import EMPTY_ANSWER, EMPTY_PROMPT, WRONG_TYPE, RowProblem
from pipeline.data.converters import Converted
from pipeline.data.messages import Message, assistant, text_of, user
from pipeline.data.roles import calls_in
from pipeline.data.row_view import RowView

_MARK = re.compile(r"(?:^|\n)[ \t]*(USER|ASSISTANT|FUNCTION RESPONSE):")
_END, _CALL = "<|endoftext|>", "<functioncall>"


def _transcript(row: RowView) -> Converted:
    where = row.name("chat")
    text = row.text("chat", EMPTY_PROMPT).strip()
    pieces = _MARK.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        raise RowProblem(WRONG_TYPE, f"{where} does not begin with 'USER:'")
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    messages = [_turn(who, said, f"{where}, turn {n}") for n, (who, said) in enumerate(turns, 1)]
    return Converted([], (messages,), None)


def _turn(who: str, said: str, where: str) -> Message:
    said = said.strip().removesuffix(_END).strip()
    if who == "USER":
        return user(text_of(said, where, EMPTY_PROMPT))
    if who == "FUNCTION RESPONSE":
        return {"role": "tool", "content": said}
    before, call, _ = said.partition(_CALL)
    if call:
        return {**assistant(before.strip()), "tool_calls": calls_in(said[len(before) :], where)}
    return assistant(text_of(said, where, EMPTY_ANSWER))


BY_LAYOUT: dict[str, Callable[[RowView], Converted]] = {"transcript": _transcript}
"""Converter of each layout, by its name in `pipeline.data.layouts`."""

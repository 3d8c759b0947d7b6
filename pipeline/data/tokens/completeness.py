"""Checks that a chat template leaves nothing out of a row.

Templates leave out tool calls and tools that they don't know, turns of roles that they don't know, and
reasoning (DeepSeek-R1's cuts it from every answer, Qwen3's from earlier ones). Such a row would train
something other than it says, so it is a bad row. Texts are searched for without white space at their ends,
then in JSON's spelling, then without any white space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.reading.bad_rows import LEFT_OUT, RowProblem
from pipeline.data.reading.messages import Message
from pipeline.data.tokens.chat_format import ChatFormat, Span, Unmaskable
from pipeline.data.tokens.message_parts import Parts, StandIns, parts_of, parts_of_tools
from pipeline.data.tokens.tool_calls import leaves

_SPACE = re.compile(r"\s+")
_SHORT = 12
"""Characters of a text that may stand in a row's rendering by chance (`4`, `ok`)."""
_SHOWN = 40


@dataclass(frozen=True)
class Rendering:
    """One conversation as text. Trained are the `spans`; without them, everything after the prompt."""

    text: str
    spans: list[Span] | None
    spoken: frozenset[int]
    """Turns that the spans belong to."""
    history: int
    """Number of turns at the beginning that the model reads: their reasoning may be left out."""


class _Reader:
    """Finds the parts of a conversation in its text, each behind the one before."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def find(self, part: str, start: int) -> int:
        """End of `part` in the text, searched from `start` on; -1 where it isn't there."""
        for form in _forms(part):
            if (found := self.text.find(form, start)) >= 0:
                return found + len(form)
        return start if _SPACE.sub("", part) in _SPACE.sub("", self.text[start:]) else -1

    def holds_turn(self, role: str, parts: Parts) -> tuple[str, str] | None:
        """Move to the end of a turn; returns the first of its parts that isn't there."""
        start = behind = self.place
        for field, part in parts:
            call = field.startswith("tool_calls")
            end = self.find(part, start if call else behind)
            if end < 0 and role in ("system", "developer"):
                end = self.find(part, 0)  # Templates gather them at the beginning.
            if end < 0 and role == "tool":
                end = self._find_leaves(part, start)
            if end < 0:
                return field, part
            behind = behind if call else max(behind, end)
            self.place = max(self.place, end if not call or field.endswith("name") else 0)
        return None

    def _find_leaves(self, part: str, start: int) -> int:
        """A tool's answer in JSON, which a template may write in its own way."""
        if not part.startswith(("{", "[")):
            return -1
        try:
            ends = [self.find(leaf, start) for leaf in leaves(json.loads(part))]
        except ValueError:
            return -1
        return -1 if -1 in ends else max(ends, default=start)


def last_end(text: str, part: str) -> int | None:
    """End of the last place of `part` in a rendered text; None where there is none."""
    ends = [place + len(form) for form in _forms(part) if (place := text.rfind(form)) >= 0]
    return max(ends) if part and ends else None


def _forms(part: str) -> Iterator[str]:
    yield part
    for ascii_only in (False, True):
        escaped = json.dumps(part, ensure_ascii=ascii_only)[1:-1]
        if escaped != part:
            yield escaped
            yield re.sub("[<>&']", lambda found: f"\\u{ord(found[0]):04x}", escaped)


class Completeness:
    """Checks renderings by one chat template against the rows that they were made of."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._shapes: dict[str, set[tuple[int, str]]] = {}
        """Shape of a conversation -> (turn, kind of field) that the template leaves out of all such."""

    def check(self, messages: Sequence[Message], kwargs: dict[str, Any], made: Rendering) -> None:
        """RowProblem that names the first thing left out."""
        tools = kwargs.get("tools") or ()
        parts = _all_parts(messages, tools, made.history)
        missing = next(_left_out(messages, parts, made), None)
        if (
            missing is None
            and not tools
            and all(len(part) >= _SHORT for inside in parts for _, part in inside)
        ):
            return
        # A search can succeed by mistake: for short texts, for a tool's name (in a call of it), and for a
        # missing turn whose text is in the next one, which then is not found behind it.
        dropped = self._of_shape(messages, parts, kwargs, made)
        for turn, inside in enumerate(parts) if dropped else ():
            if missing is not None and turn >= missing[0]:
                break
            for field, part in inside:
                if (turn, _kind(field)) not in dropped:
                    continue
                if missing is not None or len(part) < _SHORT or turn == len(messages):
                    raise RowProblem(LEFT_OUT, f"{_place(messages, turn)}{field} {_first_words(part)}")
        if missing is not None:
            turn, field, part, where = missing
            raise RowProblem(LEFT_OUT, f"{_place(messages, turn)}{field} {_first_words(part)}{where}")

    def _of_shape(
        self, messages: Sequence[Message], parts: list[Parts], kwargs: dict[str, Any], made: Rendering
    ) -> set[tuple[int, str]]:
        fields = [[*dict.fromkeys(field for field, _ in inside)] for inside in parts[:-1]]
        roles = [(message["role"], message["content"] is None) for message in messages]
        others = {key: value for key, value in kwargs.items() if key != "tools"}
        how = (made.spans is None, sorted(made.spoken), made.history, bool(parts[-1]))
        key = json.dumps([fields, roles, others, how], sort_keys=True, default=str)
        if key not in self._shapes:
            self._shapes[key] = self._tried(messages, kwargs, made)
        return self._shapes[key]

    def _tried(
        self, messages: Sequence[Message], kwargs: dict[str, Any], made: Rendering
    ) -> set[tuple[int, str]]:
        """(turn, kind of field) of what is lost when words that no text has stand in for the row's."""
        words = StandIns()
        messages = [words.message(message) for message in messages]
        if kwargs.get("tools"):
            kwargs = {**kwargs, "tools": [words.tool()]}
        try:
            if made.spans is None:
                asks = messages[-1]["role"] != "assistant"
                text, spans = self._chat.render(messages, kwargs, for_generation=asks), None
            else:
                text, spans = self._chat.render_with_answers(messages, sorted(made.spoken), kwargs)
        except (RowProblem, Unmaskable):
            return set()  # The template depends on contents: then only the row's own rendering is checked.
        parts = _all_parts(messages, kwargs.get("tools") or (), made.history)
        again = Rendering(text, spans, made.spoken, made.history)
        return {(turn, _kind(field)) for turn, field, _, _ in _left_out(messages, parts, again)}


def _all_parts(messages: Sequence[Message], tools: Sequence[Any], history: int) -> list[Parts]:
    """Parts of every turn, and of the tools behind them."""
    turns = [
        parts_of(message, turn, reasoning=turn >= history or message["role"] != "assistant")
        for turn, message in enumerate(messages)
    ]
    return [*turns, [*parts_of_tools(tools)]]


def _left_out(
    messages: Sequence[Message], parts: list[Parts], made: Rendering
) -> Iterator[tuple[int, str, str, str]]:
    """(turn, field, text, where it is missing) of what isn't in the rendering."""
    whole = _Reader(made.text)
    counted = None
    if made.spans is not None:
        counted = _Reader(_spoken(made.text, made.spans))
    for turn, (message, inside) in enumerate(zip(messages, parts, strict=False)):
        missing = whole.holds_turn(message["role"], inside)
        where = ""
        if missing is None and counted is not None and turn in made.spoken:
            missing, where = counted.holds_turn(message["role"], inside), ", in what is trained"
        if missing is not None:
            yield turn, *missing, where
    for field, part in parts[-1]:
        if whole.find(part, 0) < 0:
            yield len(messages), field, part, ""


def _spoken(text: str, spans: list[Span]) -> str:
    """The trained spans of a text, kept apart."""
    pieces, before = [], 0
    for first, end in spans:
        pieces.append(text[first:end] if first == before else f"\n\0\n{text[first:end]}")
        before = end
    return "".join(pieces)


def _place(messages: Sequence[Message], turn: int) -> str:
    return f"turn {turn + 1} ({messages[turn]['role']}): " if turn < len(messages) else ""


def _kind(field: str) -> str:
    """A field without its numbers."""
    return re.sub(r"\[\d+\]", "", field)


def _first_words(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")

"""Brings tool calls into the form that a chat template renders, and takes calls apart.

OpenAI writes a call's `arguments` as JSON text. Most templates want an object, which they write as JSON
themselves (text would be encoded twice), others want the text. Rendering a probe, once per template, shows
which one it takes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.reading.bad_rows import LEFT_OUT, WRONG_TYPE, RowProblem
from pipeline.data.reading.messages import Message

_NAME, _KEY, _VALUE = "raylign_call", "raylign_key", "raylign value"
_QUESTION: Message = {"role": "user", "content": "?"}
_RESULT: Message = {"role": "tool", "name": _NAME, "tool_call_id": "raylign01", "content": "raylign result"}


@dataclass(frozen=True)
class CallForm:
    """Form of tool calls that one template takes: arguments as an object, as text, or (both) unchanged."""

    objects: bool
    text: bool
    empty: str | None
    """Content of a turn that is only a call: DeepSeek's templates want None, not empty text."""

    def fitted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with every call in this form. RowProblem where a call can't be brought into it."""
        if not any("tool_calls" in message for message in messages):
            return messages
        return [self._message(message, turn) for turn, message in enumerate(messages, 1)]

    def _message(self, message: Message, turn: int) -> Message:
        if "tool_calls" not in message:
            return message
        calls = calls_of(message, turn)
        if not calls:  # Templates ask whether there is such a key, not whether it holds something.
            return {key: value for key, value in message.items() if key != "tool_calls"}
        if not (self.objects or self.text):
            said = "a call of a tool (tool_calls, function_call), which the template can't write"
            raise RowProblem(LEFT_OUT, f"turn {turn} ({message['role']}): {said}")
        fitted = [self._call(call, f"turn {turn}: tool_calls[{i}]") for i, call in enumerate(calls)]
        content = message["content"] or self.empty
        return {**message, "content": content, "tool_calls": fitted}

    def _call(self, call: dict[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(call.get("function"), dict):
            inside = {key: value for key, value in call.items() if key not in ("id", "type")}
            call = {
                "type": "function",
                **{k: call[k] for k in ("id", "type") if k in call},
                "function": inside,
            }
        function = call["function"]
        if "arguments" not in function:
            return call
        return {**call, "function": {**function, "arguments": self._arguments(function["arguments"], where)}}

    def _arguments(self, value: Any, where: str) -> Any:
        if isinstance(value, str) and not self.text:
            return _parsed(value, where)
        if not isinstance(value, str) and not self.objects:
            return json.dumps(value, ensure_ascii=False)
        return value


def _parsed(text: str, where: str) -> dict[str, Any]:
    value: Any = text if text.strip() else {}
    try:
        for _ in range(2):  # Some sets encode it twice.
            value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RowProblem(
            WRONG_TYPE,
            f"{where}.arguments is text that is no JSON object, which the template wants ({text[:40]!r})",
        )
    return value


def calls_of(message: Message, turn: int = 0) -> list[dict[str, Any]]:
    """The calls of a message. RowProblem where they are no list of objects."""
    calls: Any = message.get("tool_calls") or []
    if isinstance(calls, str):
        with contextlib.suppress(ValueError):
            calls = json.loads(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowProblem(WRONG_TYPE, f"turn {turn}: tool_calls is not a list of objects")
    return [*calls]


def find_form(render: Callable[[list[Message]], str]) -> CallForm:
    """The form that a template takes. `render`: messages -> text, or RowProblem where it refuses them."""
    for empty in ("", None):
        objects = _writes(render, {_KEY: _VALUE}, empty)
        text = _writes(render, json.dumps({_KEY: _VALUE}), empty)
        if objects or text:
            return CallForm(objects, text, empty)
    return CallForm(False, False, "")


def _writes(render: Callable[[list[Message]], str], arguments: Any, empty: str | None) -> bool:
    """True where such a call is rendered whole, not as JSON inside JSON or as a Python dict."""
    call = {"id": "raylign01", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    turn: Message = {"role": "assistant", "content": empty, "tool_calls": [call]}
    for messages in ([_QUESTION, turn, _RESULT], [_QUESTION, turn]):
        try:
            text = render(messages)
        except RowProblem:
            continue
        whole = all(word in text for word in (_NAME, _KEY, _VALUE))
        return whole and f'\\"{_KEY}' not in text and f"'{_KEY}'" not in text
    return False


def parts_of_call(call: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, text) of a call's parts: its name, and the keys and values of its arguments."""
    function: dict[str, Any] = call["function"] if isinstance(call.get("function"), dict) else call
    if isinstance(function.get("name"), str):
        yield "name", function["name"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            yield "arguments", arguments.strip()
            return
    for leaf in leaves(arguments):
        yield "arguments", leaf


def leaves(value: Any) -> Iterator[str]:
    """Keys and values of a JSON value as they are written; not true, false and null, which languages write
    in their own ways."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield str(key)
            yield from leaves(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from leaves(inside)
    elif isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value, default=str)

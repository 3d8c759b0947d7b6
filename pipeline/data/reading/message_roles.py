"""Roles of messages under the names that data sets use, and tool calls in the forms they have there."""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.data.reading.bad_rows import UNKNOWN_ROLE, WRONG_TYPE, RowProblem

CALL = "call"
"""Role of a turn that is a tool call: it becomes the assistant's, with its content as `tool_calls`."""
DEVELOPER = "developer"

ROLES: dict[str, str] = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "bot", "model", "chatgpt", "chatbot", "ai", "bing", "bard"), "assistant"
    ),
    "system": "system",
    DEVELOPER: DEVELOPER,
    **dict.fromkeys(
        (
            "tool",
            "observation",
            "function",
            "function_response",
            "function_result",
            "tool_response",
            "tool_result",
            "ipython",
        ),
        "tool",
    ),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), CALL),
}
"""Name in a data set -> role of a message here."""

_TAGGED = re.compile(r"<(tool_call|functioncall)>(.*?)(?:</\1>|(?=<\1>)|$)", re.DOTALL)
_ARGUMENTS_IN_QUOTES = re.compile(r"""^(\{.*"arguments":\s*)'(.*)'(\s*\})$""", re.DOTALL)


def role_of(name: str, where: str) -> str:
    """One of the values of `ROLES`. Capitals, blanks around it and `-` for `_` are tolerated."""
    role = ROLES.get(name) or ROLES.get(name.strip().lower().replace("-", "_").replace(" ", "_"))
    if role is None:
        raise RowProblem(UNKNOWN_ROLE, f"{where} has {name!r}; known are {', '.join(ROLES)}")
    return role


def calls_in(content: Any, where: str) -> list[dict[str, Any]]:
    """The calls that a turn's content is: JSON of one or several, plain or in `<tool_call>` tags."""
    found: list[Any] = []
    if isinstance(content, str):
        pieces = [m[2] for m in _TAGGED.finditer(content)] if content.lstrip().startswith("<") else [content]
        for piece in pieces:
            calls = _json_of(piece, where)
            found += calls if isinstance(calls, list) else [calls]
    else:
        found = content if isinstance(content, list) else [content]
    if not found:
        raise RowProblem(WRONG_TYPE, f"{where} holds no call")
    return [_call(call, where) for call in found]


def _json_of(text: str, where: str) -> Any:
    text = text.strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # glaive's form: {"name": "f", "arguments": '{"x": 1}'}
        if quoted := _ARGUMENTS_IN_QUOTES.match(text):
            return _json_of(f"{quoted[1]}{json.dumps(quoted[2])}{quoted[3]}", where)
        raise RowProblem(
            WRONG_TYPE, f"{where} is no call of a tool: JSON of name and arguments is needed"
        ) from error


def _call(value: Any, where: str) -> dict[str, Any]:
    """A call in OpenAI's form: {"type": "function", "function": {"name", "arguments"}}."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        rest = {k: v for k, v in value.items() if k not in ("type", "function")}
        return {"type": "function", **rest, "function": _named(value["function"], where)}
    return {"type": "function", "function": _named(value, where)}


def _named(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise RowProblem(WRONG_TYPE, f"{where} is no call of a tool: an object with a name is needed")
    arguments = value.get("arguments", value.get("parameters"))
    return {"name": value["name"], "arguments": {} if arguments is None else arguments}

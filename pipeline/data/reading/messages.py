"""Converts message lists, as data sets write them, to turns of role and content, or refuses them."""

from __future__ import annotations

import json
from typing import Any

from pipeline.data.reading.bad_rows import EMPTY_ANSWER, EMPTY_PROMPT, UNKNOWN_ROLE, WRONG_TYPE, RowProblem
from pipeline.data.reading.field_values import check_encodable, from_json, type_name, without_nulls
from pipeline.data.reading.message_roles import CALL, DEVELOPER, calls_in, role_of
from pipeline.data.reading.training_flags import NAMES, Flag

Message = dict[str, Any]

_HEAD = ("role", "from", "content", "value")


def assistant(content: str) -> Message:
    """A turn of the assistant."""
    return {"role": "assistant", "content": content}


def user(content: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": content}


def text_of(value: Any, where: str, empty: str) -> str:
    """`value` as text that is not blank and can be encoded; `empty` is the reason given when it is blank."""
    if not isinstance(value, str):
        raise RowProblem(WRONG_TYPE, f"{where} is {type_name(value)}, not a string")
    if not value.strip():
        raise RowProblem(empty, where)
    check_encodable(value, where)
    return value


def is_json_messages(value: str) -> bool:
    """True for a string that is a message list as JSON, as csv files hold it.

    Any other JSON, a list of calls for one, is text.
    """
    if not value.lstrip().startswith("[") or not value.rstrip().endswith("]"):
        return False
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return bool(items) and all(isinstance(item, dict) and _is_message(item) for item in items)


def _is_message(item: dict[str, Any]) -> bool:
    if isinstance(item.get("role"), str):
        return "content" in item or "tool_calls" in item
    return isinstance(item.get("from"), str) and "value" in item


def messages_of(value: Any, where: str, flags: list[Flag], arrow: bool) -> list[Message]:
    """`value` as turns in (role, content) form.

    Roles are those of `pipeline.data.reading.message_roles`; what messages say of their training goes to
    `flags`. A blank system prompt is none. With `arrow`, nulls inside messages are keys that the row never
    had.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith(("[", "{")):
            raise RowProblem(WRONG_TYPE, f"{where} is a string, not a list of messages")
        value = from_json(value, where)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowProblem(WRONG_TYPE, f"{where} is {type_name(value)}, not a list of messages")
    if not value:
        raise RowProblem(EMPTY_PROMPT, f"{where} is an empty list")
    if _is_exchange(value[0]):
        return _exchanges(value, where)
    messages = [_message(item, f"{where}[{i}]", flags, arrow) for i, item in enumerate(value)]
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    if not messages:
        raise RowProblem(EMPTY_PROMPT, f"{where} holds nothing but a blank system prompt")
    roles = {m["role"] for m in messages}
    if DEVELOPER in roles:
        if "system" in roles:
            raise RowProblem(UNKNOWN_ROLE, f"{where} has {DEVELOPER!r} beside 'system': one of them is read")
        for message in messages:
            if message["role"] == DEVELOPER:
                message["role"] = "system"
    return messages


def in_turns(value: Any) -> Any:
    """Messages of LIMA's form, which is the texts of a conversation alone: the user speaks first."""
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) for item in value):
        return value
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]


def _is_exchange(item: Any) -> bool:
    """Capybara's form: question and answer in one object."""
    return (
        isinstance(item, dict) and {"input", "output"} <= item.keys() and not {"role", "from"} & item.keys()
    )


def _exchanges(items: list[Any], where: str) -> list[Message]:
    messages = []
    for index, item in enumerate(items):
        if not _is_exchange(item):
            raise RowProblem(WRONG_TYPE, f"{where}[{index}] has no input and output, as those before it")
        messages.append(user(text_of(item["input"], f"{where}[{index}].input", EMPTY_PROMPT)))
        messages.append(assistant(text_of(item["output"], f"{where}[{index}].output", EMPTY_ANSWER)))
    return messages


def _message(item: Any, where: str, flags: list[Flag], arrow: bool) -> Message:
    if not isinstance(item, dict):
        raise RowProblem(WRONG_TYPE, f"{where} is {type_name(item)}, not a message")
    name, content = item.get("role"), item.get("content")
    name = item.get("from") if name is None else name
    content = item.get("value") if content is None else content
    if not isinstance(name, str):
        raise RowProblem(WRONG_TYPE, f"{where} has no role")
    role = role_of(name, where)
    if len(item) == 2 and content is not None and role != CALL:  # most messages have nothing else
        return {"role": role, "content": _content(content, role, False, where)}
    rest = {k: v for k, v in item.items() if k not in _HEAD and v is not None}
    said = [(k, rest.pop(k)) for k in NAMES & rest.keys()] if rest else []
    if role == CALL:
        role, content, rest["tool_calls"] = "assistant", "", calls_in(content, f"{where} ({name})")
    if rest:
        rest = _fields(rest, role, where, arrow)
    content = _content(content, role, bool(rest.get("tool_calls")), where)
    message = {"role": role, "content": content, **rest}
    flags += [Flag(message, f"{where}.{key}", key, value) for key, value in said]
    return message


def _fields(fields: dict[str, Any], role: str, where: str, arrow: bool) -> dict[str, Any]:
    """Fields of a message other than role and content, which the template gets."""
    if arrow:
        fields = without_nulls(fields)
    if role == "assistant" and "function_call" in fields:
        if fields.get("tool_calls"):
            raise RowProblem(WRONG_TYPE, f"{where} has function_call beside tool_calls")
        fields["tool_calls"] = calls_in(fields.pop("function_call"), f"{where}.function_call")
    if "tool_calls" in fields:
        calls = from_json(fields["tool_calls"], f"{where}.tool_calls")
        if isinstance(calls, dict):
            calls = [calls]
        if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise RowProblem(WRONG_TYPE, f"{where}.tool_calls is not a list of objects")
        fields = {k: v for k, v in fields.items() if k != "tool_calls"} | (
            {"tool_calls": calls} if calls else {}
        )
    check_encodable(fields, where)
    return fields


def _content(content: Any, role: str, calls: bool, where: str) -> str:
    if isinstance(content, list):
        content = _joined_parts(content, where)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RowProblem(WRONG_TYPE, f"{where}.content is {type_name(content)}, not a string")
    if not content.strip():
        if role == "user":
            raise RowProblem(EMPTY_PROMPT, f"{where}.content")
        if role == "assistant" and not calls:
            raise RowProblem(EMPTY_ANSWER, f"{where}.content")
    elif not content.isascii():
        check_encodable(content, f"{where}.content")
    return content


def _joined_parts(parts: list[Any], where: str) -> str:
    if not all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
    ):
        raise RowProblem(WRONG_TYPE, f"{where}.content has parts that are not text")
    return "".join(p["text"] for p in parts)

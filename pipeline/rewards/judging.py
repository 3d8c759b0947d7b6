"""A judge's questions from a template, and its verdicts from what it says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.rewards.spec import JudgeReward
from pipeline.rewards.values import cut

FIELD = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")
"""A field of a template, `{name}`; `{{name}}` stands for the text `{name}`. Other braces are themselves, such
as those of JSON that a template asks for."""
GIVEN = ("prompt", "completion")


class Unreadable(Exception):
    """Raised where an answer holds no verdict; its text says why."""


def fields_of(template: str) -> list[str]:
    """Names in a template, `prompt` and `completion` among them."""
    return list(dict.fromkeys(match[2] for match in FIELD.finditer(template) if match[2]))


def filled(template: str, values: Mapping[str, Any]) -> str:
    """The template with every field's value. A value is taken as it stands: what looks like a field in it is
    text."""
    return FIELD.sub(lambda match: f"{{{match[1]}}}" if match[1] else as_text(values[match[2]]), template)


def as_text(value: Any) -> str:
    """A column's value, a prompt or a completion as text: of one message its content, of several all of them,
    each below its role."""
    if isinstance(value, str):
        return value
    messages = (
        isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value)
    )
    if not messages:
        return json.dumps(value, ensure_ascii=False, default=str)
    if len(value) == 1:
        return str(value[0]["content"])
    return "\n\n".join(f"{message.get('role', '')}: {message['content']}" for message in value)


def question(spec: JudgeReward, template: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Body of a chat completion that asks for one sample's verdict, decoded greedily."""
    return {
        "model": spec.model,
        "messages": [{"role": "user", "content": filled(template, values)}],
        "temperature": 0,
        "max_tokens": spec.max_tokens,
        **spec.extra_body,
    }


def said(reply: Any) -> str:
    """Text of a chat completion.

    Raises:
        Unreadable: it is none, or has no text.
    """
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Unreadable(f"it answered no chat completion: {cut(repr(reply))}") from None
    if not isinstance(text, str):
        raise Unreadable(f"it answered without text: {cut(repr(reply))}")
    return text


def verdict(spec: JudgeReward, text: str) -> float:
    """The number that a judge's answer ends with.

    Raises:
        Unreadable: there is none.
    """
    if spec.pattern is not None:
        found = re.findall(spec.pattern, text)
        what, where = (found[-1] if found else None), f"pattern '{spec.pattern}'"
    else:
        found = [value for value in objects(text) if spec.json_key in value]
        what, where = (found[-1][spec.json_key] if found else None), f"JSON object with '{spec.json_key}'"
    if what is None:
        raise Unreadable(f"its verdict can't be read: no {where} in {cut(text)!r}")
    number = spec.values.get(what.strip() if isinstance(what, str) else json.dumps(what))
    if number is None:
        try:
            number = float(what)
        except (ValueError, TypeError):
            number = math.nan
    if not math.isfinite(number):
        raise Unreadable(f"its verdict can't be read: {what!r} is no finite number, in {cut(text)!r}")
    return number


def objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects in a text, in order; those within another one are not looked at by themselves."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = text.find("{", end)

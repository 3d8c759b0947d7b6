"""Calls of tools come out of a template as the row has them, whichever form their arguments are in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from actors.errors import UserError
from pipeline.data.tokens.tokenize import tokenize
from tests.pipeline.data.tokens.one_row import (
    CHATML,
    assistant,
    counted,
    records,
    tokenizer_with,
    trl_template,
    user,
)

ARGUMENTS = {"city": "Oslo", "days": 2}
WRITES_CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for call in m.tool_calls %}<call>{{ call.function.name }} ARGUMENTS</call>"
    "{% endfor %}",
)
WANTS_OBJECTS = WRITES_CALLS.replace("ARGUMENTS", "{{ call.function.arguments | tojson }}")
WANTS_TEXT = WRITES_CALLS.replace("ARGUMENTS", "{{ '' + call.function.arguments }}")
PRINTS = WRITES_CALLS.replace("ARGUMENTS", "{{ call.function.arguments }}")
NEITHER = WRITES_CALLS.replace("ARGUMENTS", "{{ call.function.arguments | string | tojson }}")


def said(template: str, arguments: Any, framed: bool = True) -> str:
    """What is trained of an answer that is one call."""
    call: dict[str, Any] = {"name": "get_weather", "arguments": arguments}
    call = {"type": "function", "function": call} if framed else call
    tokenizer = tokenizer_with(template)
    data = tokenize(records([user("Rain?")], [assistant("", tool_calls=[call])]), tokenizer)
    return counted(data, tokenizer)[0].strip()


@pytest.mark.parametrize(
    "arguments", [ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(json.dumps(ARGUMENTS))], ids=str
)
def test_a_template_that_writes_objects_as_json_gets_objects(arguments: Any) -> None:
    assert said(WANTS_OBJECTS, arguments) == '<call>get_weather {"city": "Oslo", "days": 2}</call><|im_end|>'


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=str)
@pytest.mark.parametrize("template", [WANTS_TEXT, PRINTS], ids=["joined", "printed"])
def test_a_template_that_writes_them_as_they_are_gets_text(template: str, arguments: Any) -> None:
    assert said(template, arguments) == '<call>get_weather {"city": "Oslo", "days": 2}</call><|im_end|>'


def test_a_template_that_takes_both_gets_what_the_row_has() -> None:
    tight = '{"city":"Oslo"}'
    assert tight in said(trl_template("qwen3"), tight)
    assert '{"city": "Oslo"}' in said(trl_template("qwen3"), json.loads(tight))


@pytest.mark.parametrize(
    "name", ["qwen2_5", "llama3_1", "gptoss", "glm4moe", "deepseekv3", "deepseek_r1_distill"]
)
@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "text"])
def test_templates_in_the_field_write_both_forms_alike_and_once(name: str, arguments: Any) -> None:
    template = trl_template(name)
    assert said(template, arguments) == said(template, ARGUMENTS)
    assert '\\"' not in said(template, arguments)


def test_a_call_without_the_frame_of_openai_is_the_same_call() -> None:
    assert said(WANTS_OBJECTS, ARGUMENTS, framed=False) == said(WANTS_OBJECTS, ARGUMENTS)


def test_empty_text_is_a_call_without_arguments() -> None:
    assert said(WANTS_OBJECTS, "") == "<call>get_weather {}</call><|im_end|>"


@pytest.mark.parametrize("arguments", ["city=Oslo", "[1, 2]", '{"city": '])
def test_text_that_is_no_object_is_named_where_the_template_wants_one(arguments: str) -> None:
    with pytest.raises(
        UserError, match=r"row 1: wrong type: turn 2: tool_calls\[0\]\.arguments is text that"
    ):
        said(WANTS_OBJECTS, arguments)


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "text"])
def test_what_comes_out_right_in_neither_form_is_named(arguments: Any) -> None:
    with pytest.raises(UserError, match=r"row 1: left out by the chat template: turn 2 .* a call of a tool"):
        said(NEITHER, arguments)


def test_an_empty_list_of_calls_is_none() -> None:
    counts_calls = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% if 'tool_calls' in m %} with {{ m.tool_calls | length }}{% endif %}",
    )
    tokenizer = tokenizer_with(counts_calls)
    data = tokenize(records([user("Q")], [assistant("A", tool_calls=[])]), tokenizer)
    assert counted(data, tokenizer)[0].strip() == "A<|im_end|>"

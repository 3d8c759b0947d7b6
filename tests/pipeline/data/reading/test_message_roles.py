"""Roles of messages: names that data sets use are mapped, or the row is named with its role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from tests.pipeline.data.reading.rows import GOOD, USER, load

CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}
CALLED = {"type": "function", "function": CALL}


@pytest.mark.parametrize(
    ("written", "role"),
    [
        ("human", "user"), ("prompter", "user"), ("customer", "user"), ("User", "user"), (" user ", "user"),
        ("gpt", "assistant"), ("chatgpt", "assistant"), ("bing", "assistant"), ("bard", "assistant"),
        ("bot", "assistant"), ("model", "assistant"), ("ASSISTANT", "assistant"), ("observation", "tool"),
        ("function_response", "tool"), ("tool-response", "tool"), ("ipython", "tool"), ("function", "tool"),
        ("developer", "system"), ("System", "system"),
    ],
)  # fmt: skip
def test_a_name_of_a_role_becomes_the_role_that_templates_know(
    tmp_path: Path, written: str, role: str
) -> None:
    turns = [
        {"from": written, "value": "hm"},
        {"from": "human", "value": "2+2?"},
        {"from": "gpt", "value": "4"},
    ]
    assert load(tmp_path, [{"conversations": turns}], "sft")[0].completion[0] == {
        "role": role,
        "content": "hm",
    }


def test_a_role_that_nobody_knows_is_a_bad_row_that_names_it(tmp_path: Path) -> None:
    turns = [{"role": "narrator", "content": "Once."}, GOOD]
    with pytest.raises(
        UserError, match=r"row 2: unknown role: messages\[0\] has 'narrator'; known are user, "
    ):
        load(tmp_path, [{"messages": [USER, GOOD]}, {"messages": turns}], "sft")


def test_a_developer_beside_a_system_prompt_is_a_bad_row(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER, GOOD]
    with pytest.raises(UserError, match="'developer' beside 'system'"):
        load(tmp_path, [{"messages": turns}], "sft")


@pytest.mark.parametrize(
    ("content", "calls"),
    [
        (json.dumps(CALL), [CALLED]),
        (json.dumps([CALL, CALL]), [CALLED, CALLED]),
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", [CALLED]),
        (
            f"<tool_call>{json.dumps(CALL)}</tool_call>\n<tool_call>{json.dumps(CALL)}</tool_call>",
            [CALLED] * 2,
        ),
        (json.dumps({"name": "get_weather", "parameters": {"city": "Oslo"}}), [CALLED]),
        (json.dumps({"type": "function", "id": "a1", "function": CALL}), [{**CALLED, "id": "a1"}]),
    ],
)
@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_a_turn_that_is_a_call_becomes_the_assistants(
    tmp_path: Path, role: str, content: str, calls: list[Any]
) -> None:
    turns = [USER, {"role": role, "content": content}, {"role": "tool", "content": ""}, GOOD]
    found = load(tmp_path, [{"messages": turns}], "sft")[0].completion
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": calls}
    assert found[2] == {"role": "tool", "content": ""}


@pytest.mark.parametrize("content", ["get_weather(Oslo)", '{"city": "Oslo"}', "[]", "[1]"])
def test_a_call_that_is_no_json_of_a_name_is_a_bad_row(tmp_path: Path, content: str) -> None:
    turns = [USER, {"role": "function_call", "content": content}, GOOD]
    with pytest.raises(UserError, match=r"row 1: wrong type: messages\[1\] \(function_call\)"):
        load(tmp_path, [{"messages": turns}], "sft")


def test_openais_former_function_call_is_a_tool_call(tmp_path: Path) -> None:
    asked = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [USER, asked, {"role": "function", "name": "f", "content": "4"}, {**GOOD, "function_call": None}]
    found = load(tmp_path, [{"messages": turns}], "sft")[0].completion
    assert found[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    ]
    assert found[2] == {"role": "tool", "name": "f", "content": "4"}
    assert found[3] == GOOD


def test_tool_calls_as_json_text_are_read_and_an_empty_list_is_none(tmp_path: Path) -> None:
    turns = [USER, {"role": "assistant", "tool_calls": json.dumps([CALLED])}, {**GOOD, "tool_calls": []}]
    found = load(tmp_path, [{"messages": turns}], "sft")[0].completion
    assert found[1]["tool_calls"] == [CALLED]
    assert found[2] == GOOD
    turns[1] = {**GOOD, "tool_calls": "[{"}
    with pytest.raises(UserError, match=r"row 1: wrong type: messages\[1\]\.tool_calls is not valid JSON"):
        load(tmp_path, [{"messages": turns}], "sft")


EMPTY_TURNS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a question": ([{"role": "user", "content": " "}, GOOD], r"empty prompt: messages\[0\]"),
    "a later question": ([USER, GOOD, {"role": "user", "content": ""}, GOOD], r"empty prompt: messages\[2\]"),
    "an answer in the middle": (
        [USER, {"role": "assistant", "content": "\n"}, USER, GOOD],
        r"empty answer: messages\[1\]",
    ),
}


@pytest.mark.parametrize("case", EMPTY_TURNS)
@pytest.mark.parametrize("kind", ["sft", "prompt"])
def test_an_empty_turn_is_a_bad_row(tmp_path: Path, case: str, kind: str) -> None:
    turns, said = EMPTY_TURNS[case]
    with pytest.raises(UserError, match=f"row 2: {said}"):
        load(tmp_path, [{"messages": [USER, GOOD]}, {"messages": turns}], kind)


@pytest.mark.parametrize("turn", ["Human", "Assistant"])
def test_an_empty_turn_inside_a_transcript_is_a_bad_row(tmp_path: Path, turn: str) -> None:
    texts = {"Human": "Hi.", "Assistant": "Hello.", turn: " "}
    start = f"\n\nHuman: {texts['Human']}\n\nAssistant: {texts['Assistant']}\n\nHuman: 2+2?\n\nAssistant:"
    with pytest.raises(UserError, match=r"row 1: empty (prompt|answer): chosen"):
        load(tmp_path, [{"chosen": f"{start} 4", "rejected": f"{start} 5"}], "preference")


BRIEF = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_that_the_messages_begin_with_comes_once(tmp_path: Path, column: str) -> None:
    row = {column: "Be brief.", "messages": [BRIEF, USER, GOOD]}
    assert load(tmp_path, [row], "sft")[0].completion == [BRIEF, USER, GOOD]


def test_another_system_prompt_beside_the_messages_own_is_a_bad_row(tmp_path: Path) -> None:
    row = {"system": "Be long.", "prompt": [BRIEF, USER], "completion": "4"}
    with pytest.raises(UserError, match=r"row 1: two system prompts: .*'Be long\.'.*'Be brief\.'"):
        load(tmp_path, [row], "sft")


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_a_blank_system_prompt_is_none(tmp_path: Path, blank: str | None) -> None:
    assert load(tmp_path, [{"system": blank, "messages": [USER, GOOD]}], "sft")[0].completion == [USER, GOOD]
    turns = [{"role": "system", "content": blank or ""}, USER, GOOD]
    assert load(tmp_path, [{"messages": turns}], "sft")[0].completion == [USER, GOOD]


def test_a_conversation_that_waits_for_its_answer_is_a_prompt(tmp_path: Path) -> None:
    rows = [{"messages": [BRIEF, USER, GOOD, USER], "answer": "4"}, {"messages": [USER], "answer": 4}]
    found = load(tmp_path, rows, "prompt")
    assert [record.prompt for record in found.rows] == [[BRIEF, USER, GOOD, USER], [USER]]
    assert found.columns == {"answer": ["4", 4]}


def test_a_prompt_whose_answer_is_a_call_has_no_answer_to_compare_with(tmp_path: Path) -> None:
    record = load(tmp_path, [{"messages": [USER, {"role": "assistant", "tool_calls": [CALLED]}]}], "prompt")[
        0
    ]
    assert (record.prompt, record.columns) == ([USER], {})

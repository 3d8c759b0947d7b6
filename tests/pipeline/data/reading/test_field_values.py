"""Single values: labels and margins as text, JSON in text, nulls of Arrow, text that can't be encoded."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.reading.bad_rows import RowProblem
from pipeline.data.reading.field_values import finite_number, true_or_false, without_nulls
from pipeline.data.reading.records import load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.tokenize import tokenize
from tests.pipeline.data.reading.rows import GOOD, USER, load, load_parquet


@pytest.mark.parametrize(
    "value", ["True", "true", "1", "1.0", "yes", "desirable", 1, 1.0, Decimal(1), True, np.bool_(True)]
)
def test_true_is_read_in_all_its_forms(value: Any) -> None:
    assert true_or_false(value, "label") is True


@pytest.mark.parametrize("value", ["False", "0", "0.0", "No", "undesirable", 0, 0.0, False, np.bool_(False)])
def test_false_is_read_in_all_its_forms(value: Any) -> None:
    assert true_or_false(value, "label") is False


@pytest.mark.parametrize("value", ["maybe", "2", 2, 0.5, [], "class 1"])
def test_what_is_neither_is_refused_by_its_value(value: Any) -> None:
    with pytest.raises(RowProblem) as problem:
        true_or_false(value, "label")
    assert f"label is {value!r}" in problem.value.detail


@pytest.mark.parametrize(
    ("value", "number"),
    [("0.5", 0.5), (" 2 ", 2.0), (3, 3.0), (-0.25, -0.25), ("1e-1", 0.1), (Decimal("0.5"), 0.5)],
)
def test_numbers_are_read_from_text(value: Any, number: float) -> None:
    assert finite_number(value, "margin") == number


@pytest.mark.parametrize("value", ["much", "nan", float("inf"), True, None, [1], "0,5"])
def test_what_is_no_number_is_refused_by_its_value(value: Any) -> None:
    with pytest.raises(RowProblem) as problem:
        finite_number(value, "margin")
    assert f"margin is {value!r}" in problem.value.detail


def test_labels_of_a_csv_file_are_read_and_an_empty_one_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "kto.csv"
    path.write_text("prompt,completion,label\n2+2?,4,True\n2+2?,5,False\n3+3?,6,1\n3+3?,7,0.0\n")
    found = load_records([DataSpec(source=str(path))], "unpaired", seed=0)
    assert {r.row: r.columns["label"] for r in found.rows} == {1: True, 2: False, 3: True, 4: False}
    path.write_text("prompt,completion,label\n2+2?,4,True\n2+2?,5,\n")
    with pytest.raises(UserError, match="row 2: missing column: label is null"):
        load_records([DataSpec(source=str(path))], "unpaired", seed=0)


def test_margins_of_a_csv_file_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,margin\n2+2?,4,5,0.5\n3+3?,6,7,2\n")
    records = load_records([DataSpec(source=str(path))], "preference", seed=0)
    data = tokenize(records, byte_tokenizer(), scored=True)
    assert data.sequences.columns["margin"].tolist() == [0.5, 2.0]


def test_nulls_that_arrow_adds_are_removed_as_trl_does_it(tmp_path: Path) -> None:
    from trl.trainer.utils import remove_none_values

    tools = [
        {"name": name, "parameters": {"properties": {argument: {"type": "string", "enum": [None, "a"]}}}}
        for name, argument in (("f", "x"), ("g", "y"))
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": tools[:1]},
        {"messages": [USER, GOOD], "tools": tools[1:]},
    ]
    found = load_parquet(tmp_path, rows, "sft")
    assert [r.template_kwargs["tools"] for r in found.rows] == [tools[:1], tools[1:]]
    assert found[0].completion[1]["tool_calls"] == [call]
    assert found[1].completion == [USER, GOOD]
    padded = {"a": None, "b": [{"c": None, "d": [None, 1]}], "e": {"f": None}}
    assert without_nulls(padded) == remove_none_values(padded)


def test_nulls_that_a_json_row_has_in_its_tools_stay(tmp_path: Path) -> None:
    tools = [{"name": "f", "parameters": {"x": {"default": None}}}]
    row = {"messages": [USER, {**GOOD, "reasoning_content": None}], "tools": tools}
    record = load(tmp_path, [row], "sft")[0]
    assert record.template_kwargs == {"tools": tools}
    assert record.completion == [USER, GOOD]


def test_what_goes_to_the_template_may_be_json_text(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "chat_template_kwargs": '{"enable_thinking": false}', "tools": ['{"name": "f"}']}
    record = load(tmp_path, [row], "prompt")[0]
    assert record.template_kwargs == {"enable_thinking": False, "tools": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("chat_template_kwargs", "{enable", "chat_template_kwargs is not valid JSON"),
        ("chat_template_kwargs", "[1]", "chat_template_kwargs is a list, not an object"),
        ("tools", '[{"name": "f"', "tools is not valid JSON"),
        ("tools", {"name": "f"}, "tools is an object, not a list of tools"),
        ("tools", "[" * 50_000 + "]" * 50_000, "tools is not valid JSON"),
    ],
)
def test_what_the_template_cannot_take_is_a_bad_row(
    tmp_path: Path, column: str, value: Any, said: str
) -> None:
    with pytest.raises(UserError, match=f"row 2: wrong type: {said}"):
        load(tmp_path, [{"messages": [USER, GOOD]}, {"messages": [USER, GOOD], column: value}], "sft")


def test_a_json_list_that_is_no_message_list_is_text(tmp_path: Path) -> None:
    calls = '[{"name": "get_time", "arguments": {"zone": "CET"}}]'
    record = load(tmp_path, [{"prompt": "Which calls?", "completion": calls}], "sft")[0]
    assert record.plain == ("Which calls?", calls)
    record = load(tmp_path, [{"prompt": "2+2?", "chosen": calls, "rejected": "[]"}], "preference")[0]
    assert record.chosen == [{"role": "assistant", "content": calls}]


def test_a_message_list_in_a_csv_field_is_read(tmp_path: Path) -> None:
    written = '[{"from": "human", "value": "2+2?"}]'
    record = load(tmp_path, [{"prompt": written, "completion": "4"}], "sft")[0]
    assert (record.prompt, record.completion) == ([USER], [GOOD])


HALF = "bad \ud83d"
NOT_UTF8: dict[str, tuple[dict[str, Any], str]] = {
    "reasoning": (
        {"messages": [USER, {**GOOD, "reasoning_content": HALF}]},
        r"messages\[1\]\.reasoning_content",
    ),
    "a call's arguments": (
        {
            "messages": [
                USER,
                {**GOOD, "tool_calls": [{"function": {"name": "f", "arguments": {"x": [HALF]}}}]},
            ]
        },
        r"messages\[1\]\.tool_calls\[0\]\.function\.arguments\.x\[0\]",
    ),
    "a tool": ({"messages": [USER, GOOD], "tools": [{"name": HALF}]}, r"tools\[0\]\.name"),
    "a tool in JSON text": (
        {"messages": [USER, GOOD], "tools": '[{"name": "\\ud83d"}]'},
        r"tools\[0\]\.name",
    ),
    "a key": ({"messages": [USER, GOOD], "chat_template_kwargs": {HALF: 1}}, "a key of chat_template_kwargs"),
    "the system prompt": ({"system": HALF, "messages": [USER, GOOD]}, "system"),
}


@pytest.mark.parametrize("case", NOT_UTF8)
def test_half_a_surrogate_pair_is_a_bad_row_at_any_depth(tmp_path: Path, case: str) -> None:
    row, where = NOT_UTF8[case]
    with pytest.raises(UserError, match=f"row 2: not UTF-8: {where}"):
        load(tmp_path, [{"messages": [USER, GOOD]}, row], "sft")


def test_json_text_of_too_many_levels_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 1: nested too deeply: tools: more than 100 levels"):
        load(tmp_path, [{"messages": [USER, GOOD], "tools": "[" * 900 + "]" * 900}], "sft")

"""Messages that say whether they are trained: weight (OpenAI), train (axolotl), loss (ms-swift)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from tests.pipeline.data.reading.rows import BAD, GOOD, USER, load, load_parquet

OFF: list[dict[str, Any]] = [
    {"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}, {"loss": 0},
    {"loss_weight": 0}, {"loss_mask": 0}, {"train": "false"}, {"weight": 1, "train": False},
]  # fmt: skip
ON: list[dict[str, Any]] = [{"weight": 1}, {"train": True}, {"loss": True}, {"weight": None}, {}]


@pytest.mark.parametrize("flag", OFF, ids=str)
def test_an_answer_that_is_switched_off_is_not_trained_and_the_template_sees_no_flag(
    tmp_path: Path, flag: dict[str, Any]
) -> None:
    record = load(tmp_path, [{"messages": [USER, {**BAD, **flag}, USER, {**GOOD, "weight": 1}]}], "sft")[0]
    assert record.untrained == {1}
    assert record.completion == [USER, BAD, USER, GOOD]


@pytest.mark.parametrize("flag", ON, ids=str)
def test_an_answer_that_is_switched_on_is_trained(tmp_path: Path, flag: dict[str, Any]) -> None:
    record = load(tmp_path, [{"messages": [USER, {**GOOD, **flag}]}], "sft")[0]
    assert (record.untrained, record.completion) == (frozenset(), [USER, GOOD])


def test_flags_on_the_others_turns_do_no_harm_while_they_are_false(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be brief.", "weight": None},
        {"from": "human", "value": "2+2?", "weight": 0.0},
        {"from": "gpt", "value": "4", "weight": 1.0},
    ]
    record = load_parquet(tmp_path, [{"conversations": turns}], "sft")[0]
    assert record.untrained == frozenset()
    assert record.completion == [{"role": "system", "content": "Be brief."}, USER, GOOD]
    turns[1]["weight"] = 1.0
    with pytest.raises(
        UserError, match=r"row 1: .*conversations\[1\]\.weight is 1\.0, but only the assistant"
    ):
        load_parquet(tmp_path, [{"conversations": turns}], "sft")


@pytest.mark.parametrize("flag", [{"weight": 0.5}, {"weight": 2}, {"train": "maybe"}, {"loss": [1]}], ids=str)
def test_a_flag_that_is_neither_on_nor_off_is_a_bad_row(tmp_path: Path, flag: dict[str, Any]) -> None:
    (name,) = flag
    with pytest.raises(UserError, match=rf"row 1: wrong type: messages\[1\]\.{name} is .*, not 0 or 1"):
        load(tmp_path, [{"messages": [USER, {**GOOD, **flag}]}], "sft")


def test_training_a_part_of_a_turn_is_refused(tmp_path: Path) -> None:
    detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    with pytest.raises(UserError, match=r"messages\[1\]\.train_detail: a part of a turn can't be left out"):
        load(tmp_path, [{"messages": [USER, {**GOOD, "train_detail": detail}]}], "sft")


def test_a_row_in_which_nothing_is_left_to_train_is_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 1: nothing to train on: weight leaves every answer out"):
        load(tmp_path, [{"messages": [USER, {**GOOD, "weight": 0}]}], "sft")


def test_flags_count_in_a_completion_and_not_in_its_prompt(tmp_path: Path) -> None:
    prompt = [USER, {**BAD, "weight": 0}, {**USER, "weight": 1}]
    completion = [{**BAD, "weight": 0}, {"role": "tool", "content": "x"}, GOOD]
    record = load(tmp_path, [{"prompt": prompt, "completion": completion}], "sft")[0]
    assert record.untrained == {3}
    assert [m.keys() for m in record.prompt + record.completion] == [{"role", "content"}] * 6


def test_an_answer_of_a_pair_or_with_a_label_counts_whole(tmp_path: Path) -> None:
    rows = [{"messages": [USER, {**GOOD, "weight": 0}], "rejected_response": "5"}]
    with pytest.raises(UserError, match=r"row 1: nothing to train on: messages\[1\]\.weight is 0"):
        load(tmp_path, rows, "preference")
    rows = [{"messages": [USER, {**GOOD, "loss": False}], "label": True}]
    with pytest.raises(UserError, match=r"row 1: nothing to train on: messages\[1\]\.loss is False"):
        load(tmp_path, rows, "unpaired")


def test_flags_say_nothing_of_prompts(tmp_path: Path) -> None:
    record = load(tmp_path, [{"messages": [USER, {**GOOD, "weight": 0.5}]}], "prompt")[0]
    assert (record.prompt, record.columns) == ([USER], {"answer": "4"})


def test_flags_are_part_of_what_rows_are(tmp_path: Path) -> None:
    turns = [USER, {**BAD, "weight": 0}, USER, GOOD]
    flagged = load(tmp_path, [{"messages": turns}], "sft").fingerprint
    assert flagged != load(tmp_path, [{"messages": [USER, BAD, USER, GOOD]}], "sft").fingerprint

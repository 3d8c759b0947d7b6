"""Rows for KTO: labelled answers, pairs taken apart, and each prompt with another row's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batches.batch import Batch
from actors.errors import UserError
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.reading.records import Records, load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.kto_pairs import with_mismatched
from pipeline.data.tokens.tokenize import TokenizedData, TokenStats


def records(tmp_path: Path, rows: list[dict[str, Any]], **spec: Any) -> Records:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records([DataSpec(source=str(path), **spec)], "unpaired", seed=0)


def test_labelled_answers_keep_their_label(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1=", "completion": "2", "label": 1},
        {"prompt": "2+2=", "completion": "5", "label": False},
    ]
    found = records(tmp_path, rows)
    assert [(r.plain, r.columns["label"]) for r in found.rows] == [
        (("1+1=", "2"), True),
        (("2+2=", "5"), False),
    ]


def test_of_a_conversation_the_last_turn_is_what_the_label_is_of(tmp_path: Path) -> None:
    turns = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    found = records(tmp_path, [{"messages": turns, "label": True}])
    assert (len(found[0].prompt), found[0].completion[0]["content"]) == (3, "d")


def test_pairs_are_taken_apart_good_answers_first(tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": f"{p} good", "rejected": f"{p} bad"} for p in "xy"]
    found = records(tmp_path, rows)
    assert [(r.plain, r.columns["label"]) for r in found.rows] == [
        (("x", "x good"), True), (("y", "y good"), True), (("x", "x bad"), False), (("y", "y bad"), False),
    ]  # fmt: skip
    assert [record.completion[0]["content"] for record in found.rows] == [
        "x good",
        "y good",
        "x bad",
        "y bad",
    ]


@pytest.mark.parametrize("label", ["maybe", 2, None, 0.5, "", "2"])
def test_a_label_that_is_neither_true_nor_false_is_a_bad_row(tmp_path: Path, label: Any) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "b", "label": label},
    ]
    with pytest.raises(UserError, match=r"rows\.jsonl.*2.*label|label.*not true or false"):
        records(tmp_path, rows)


def test_answers_without_labels_are_refused_with_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add a column of true and false and name it `label`"):
        records(tmp_path, [{"prompt": "a", "completion": "b"}])


def data_of(rows: list[tuple[list[int], list[int]]]) -> TokenizedData:
    sequences = Batch.from_sequences(
        [prompt + answer for prompt, answer in rows],
        [[False] * len(prompt) + [True] * len(answer) for prompt, answer in rows],
        1,
        {"label": np.arange(len(rows)) % 2 == 0},
    )
    return TokenizedData(sequences, np.arange(len(rows)), Skipped(), TokenStats(len(rows), 0, 0, 0, 0, 0, 0))


ROWS = [([1], [11]), ([2, 2], [12, 12]), ([3], [13]), ([4], [14, 14]), ([5], [15])]


def test_each_prompt_gets_the_answer_of_the_row_before_it_in_its_batch() -> None:
    batches = [np.array([2, 0]), np.array([1, 3]), np.array([4])]
    found = with_mismatched(data_of(ROWS), batches, max_length=None).sequences
    second = [found.token_ids[found.offsets[2 * i + 1] : found.offsets[2 * i + 2]].tolist() for i in range(5)]
    assert second == [[1, 13], [2, 2, 14, 14], [3, 11], [4, 12, 12], [5, 14, 14]]
    assert found.sequences_per_row == 2
    assert found.loss_mask[found.offsets[3] : found.offsets[4]].tolist() == [False, False, True, True]
    assert found.columns["label"].tolist() == [True, False, True, False, True]


def test_a_mismatched_sequence_is_cut_at_the_limit() -> None:
    found = with_mismatched(data_of(ROWS), [np.array([1, 3])], max_length=3).sequences
    assert found.token_ids[found.offsets[3] : found.offsets[4]].tolist() == [2, 2, 14]

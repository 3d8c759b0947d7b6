"""A row that can't be used is an error with file and row, or skipped with a count; never dropped silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.reading.bad_rows import LISTED
from pipeline.data.reading.records import load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.tokenize import tokenize

GOOD = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


BAD_PREFERENCES: dict[str, tuple[Any, str]] = {
    "a missing column": ({"prompt": "2+2?", "chosen": "4"}, "missing column: rejected"),
    "a null": ({**GOOD, "chosen": None}, "missing column: chosen is null"),
    "an empty answer": ({**GOOD, "chosen": " \n"}, "empty answer: chosen"),
    "an empty prompt": ({**GOOD, "prompt": ""}, "empty prompt: prompt"),
    "chosen equal to rejected": ({**GOOD, "rejected": "4 "}, "chosen equal to rejected"),
    "a byte that is not UTF-8": (b'{"prompt": "caf\xe9", "chosen": "4", "rejected": "5"}', "not UTF-8"),
    "half a surrogate pair": (
        b'{"prompt": "2+2?", "chosen": "\\ud800", "rejected": "5"}',
        "not UTF-8: chosen",
    ),
    "broken JSON": (b'{"prompt": "2+2?", ', "not valid JSON"),
    "a number for a string": (
        {**GOOD, "chosen": 4},
        "wrong type: chosen is a number, not a string or a list of messages",
    ),
    "a list for an object": ([1, 2], "wrong type: list, not an object"),
    "a message without role": ({**GOOD, "chosen": [{"content": "4"}]}, "chosen[0] has no role"),
    "an answer by the user": ({**GOOD, "chosen": [USER], "rejected": [USER]}, "no answer by the assistant"),
    "another prompt inside": (
        {**GOOD, "prompt": "3+3?", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "5"}]},
        "different prompts",
    ),
}


@pytest.mark.parametrize("case", BAD_PREFERENCES)
def test_a_bad_row_is_named_with_file_and_row(tmp_path: Path, case: str) -> None:
    row, said = BAD_PREFERENCES[case]
    path = write(tmp_path / "pairs.jsonl", [GOOD, GOOD, row])
    with pytest.raises(UserError) as error:
        load_records([DataSpec(source=str(path))], "preference", seed=0)
    assert error.value.problems[0].startswith(f"{path} row 3: ")
    assert said in error.value.problems[0]


@pytest.mark.parametrize("case", BAD_PREFERENCES)
def test_a_bad_row_is_skipped_on_request_counted_and_listed(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [GOOD, BAD_PREFERENCES[case][0], GOOD])
    records = load_records([DataSpec(source=str(path), on_bad_row="skip")], "preference", seed=0)
    assert [record.row for record in records.rows] == [1, 3]
    assert records.skipped.total == 1
    assert records.skipped.listing[0].number == 2


TURN = "\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "said"),
    [
        (f"{TURN} a", "\n\nHuman: ho\n\nAssistant: b", "different prompts"),
        (f"{TURN} ", f"{TURN} b", "empty answer: chosen"),
        ("hello", f"{TURN} b", "chosen does not begin with"),
        (f"{TURN} a\n\nHuman: and?", f"{TURN} b", "chosen ends with the human's turn"),
    ],
)
def test_a_damaged_transcript_is_a_bad_row(tmp_path: Path, chosen: str, rejected: str, said: str) -> None:
    good = {"chosen": f"{TURN} a", "rejected": f"{TURN} b"}
    path = write(tmp_path / "hh.jsonl", [good, good, {"chosen": chosen, "rejected": rejected}])
    with pytest.raises(UserError, match="row 3") as error:
        load_records([DataSpec(source=str(path))], "preference", seed=0)
    assert said in str(error.value)


def test_all_problems_of_all_sources_come_at_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [GOOD, {**GOOD, "chosen": ""}])
    second = write(tmp_path / "b.jsonl", [{**GOOD, "rejected": 5}, GOOD])
    specs = [DataSpec(source=str(s)) for s in (first, tmp_path / "missing.jsonl", second)]
    with pytest.raises(UserError) as error:
        load_records(specs, "preference", seed=0)
    text = str(error.value)
    assert all(s in text for s in (f"{first} row 2", "missing.jsonl", f"{second} row 1", "on_bad_row: skip"))


def test_a_long_list_of_bad_rows_is_capped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD] + [{**GOOD, "chosen": ""}] * 1000)
    with pytest.raises(UserError) as error:
        load_records([DataSpec(source=str(path))], "preference", seed=0)
    assert len(error.value.problems) == LISTED + 2
    assert "980 more rows (1000 rows: 1000 empty answer)" in error.value.problems[LISTED]


def test_a_source_without_any_usable_row_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**GOOD, "chosen": ""}])
    with pytest.raises(UserError, match="none of its 1 rows can be used"):
        load_records([DataSpec(source=str(path), on_bad_row="skip")], "preference", seed=0)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        load_records([DataSpec(source=str(tmp_path / "a.jsonl"))], "sft", seed=0)


def long_rows(tmp_path: Path, on_bad_row: str) -> Any:
    rows = [
        {"prompt": "short", "completion": "yes"},
        {"prompt": "short", "completion": "y" * 100},
        {"prompt": "p" * 100, "completion": "yes"},
    ]
    path = write(tmp_path / "long.jsonl", rows)
    return load_records([DataSpec(source=str(path), on_bad_row=on_bad_row)], "sft", seed=0)  # type: ignore[arg-type]


def test_long_rows_are_cut_and_counted_and_a_prompt_that_fills_the_limit_is_a_bad_row(tmp_path: Path) -> None:
    data = tokenize(long_rows(tmp_path, "skip"), byte_tokenizer(), max_length=64)
    assert data.lengths.tolist()[1] == 64
    assert data.record_index.tolist() == [0, 1]
    assert (data.stats.truncated, data.skipped.counts) == (1, {"prompt fills max_length": 1})
    with pytest.raises(UserError, match=r"row 3: prompt fills max_length: 108 tokens, the limit is 64"):
        tokenize(long_rows(tmp_path, "error"), byte_tokenizer(), max_length=64)


def test_long_rows_are_an_error_on_request(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        tokenize(long_rows(tmp_path, "error"), byte_tokenizer(), max_length=64, truncation="error")
    assert [p.split(":")[0].split()[-1] for p in error.value.problems[:2]] == ["2", "3"]
    skipping = tokenize(long_rows(tmp_path, "skip"), byte_tokenizer(), max_length=64, truncation="error")
    assert skipping.skipped.counts == {"longer than max_length": 2}
    assert skipping.stats.truncated == 0


def test_keeping_the_end_keeps_the_answer(tmp_path: Path) -> None:
    data = tokenize(long_rows(tmp_path, "error"), byte_tokenizer(), max_length=64, truncation="keep_end")
    tail = data.batch([2]).token_ids
    assert len(tail) == 64
    assert byte_tokenizer().decode(tail).endswith("yes<|im_end|>")

"""Prompts and held-out rows that can't be used follow `on_bad_row`, with all that belongs to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.prompts import read_prompts
from pipeline.evaluation.held_out import read_eval_set
from pipeline.evaluation.spec import EvalSpec
from tests.pipeline.data.reading.rows import load
from tests.pipeline.data.tokens.one_row import CHATML, tokenizer_with

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
SYSTEM = {"role": "system", "content": "Be brief."}


def turn(said: str) -> dict[str, str]:
    return {"role": "user", "content": said}


ROWS: list[dict[str, Any]] = [
    {"prompt": [turn("1+1?")], "answer": "2"},
    {"prompt": [SYSTEM, turn("2+2?")], "answer": "4"},
    {"prompt": [turn("What is <|im_start|>?")], "answer": "a token"},
    {"prompt": [turn("3+3?")], "answer": "6"},
]


def test_prompts_that_cannot_be_used_are_left_out_with_their_columns_and_counted(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(NO_SYSTEM)
    data = read_prompts(load(tmp_path, ROWS, "prompt", on_bad_row="skip"), tokenizer)
    assert data.columns["answer"] == ["2", "6"]
    assert data.prompts == [[turn("1+1?")], [turn("3+3?")]]
    assert "1+1?" in data.texts[0]
    assert "3+3?" in data.texts[1]
    assert [tokenizer.decode(ids) for ids in data.token_ids] == data.texts
    assert data.skipped.total == 2
    assert [row.number for row in data.skipped.listing] == [2, 3]
    alone = read_prompts(load(tmp_path, [ROWS[0], ROWS[3]], "prompt"), tokenizer)
    assert data.fingerprint == load(tmp_path, [ROWS[0], ROWS[3]], "prompt", on_bad_row="skip").fingerprint
    assert data.token_ids == alone.token_ids


def test_without_it_they_are_all_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_prompts(load(tmp_path, ROWS, "prompt"), tokenizer_with(NO_SYSTEM))
    assert "row 2: refused" in error.value.problems[0]
    assert "row 3: holds" in error.value.problems[1]


def test_a_long_prompt_among_them_is_counted_too(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": [turn("9" * 90)], "answer": "9"}]
    data = read_prompts(
        load(tmp_path, rows, "prompt", on_bad_row="skip"), tokenizer_with(NO_SYSTEM), max_prompt_tokens=64
    )
    assert data.columns["answer"] == ["2", "6"]
    assert data.skipped.total == 3


def test_an_evaluation_leaves_them_out_and_says_so(tmp_path: Path) -> None:
    load(tmp_path, ROWS, "prompt")
    source = DataSpec(source=str(tmp_path / "rows.jsonl"), on_bad_row="skip")
    held_out = read_eval_set(EvalSpec(data=[source]), tokenizer_with(NO_SYSTEM), 0)
    assert held_out.data.columns["answer"] == ["2", "6"]
    assert [len(held_out.data.texts), len(held_out.data.token_ids)] == [2, 2]
    assert held_out.remarks()[0].startswith("eval: left out 2 rows: ")
    refusing = EvalSpec(data=[source.model_copy(update={"on_bad_row": "error"})])
    with pytest.raises(UserError, match="row 2: refused by the chat template"):
        read_eval_set(refusing, tokenizer_with(NO_SYSTEM), 0)


def test_no_prompt_left_is_an_error(tmp_path: Path) -> None:
    records = load(tmp_path, ROWS[1:2], "prompt", on_bad_row="skip")
    with pytest.raises(UserError, match=r"^no prompts left \(1 row: 1 refused"):
        read_prompts(records, tokenizer_with(NO_SYSTEM))
    source = DataSpec(source=str(tmp_path / "rows.jsonl"), on_bad_row="skip")
    with pytest.raises(UserError, match=r"eval\.data: no prompts left \(1 row: 1 refused"):
        read_eval_set(EvalSpec(data=[source]), tokenizer_with(NO_SYSTEM), 0)

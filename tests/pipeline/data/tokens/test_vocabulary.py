"""Tokens that the base's embedding has no row for are told by row, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.reading.records import Records
from pipeline.data.tokens.prompts import read_prompts
from pipeline.data.tokens.tokenize import tokenize
from tests.pipeline.data.reading.rows import load

ROWS = [
    {"prompt": "2+2?", "completion": "4"},
    {"prompt": "3+3?", "completion": "<think>carry</think>6"},
    {"prompt": "<think>5+5?", "completion": "10"},
]


def tokenizer_with_more() -> tuple[Any, int]:
    """A tokenizer to which somebody added tokens, and the rows that the base has."""
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer, rows


def records(path: Path, kind: str, on_bad_row: str = "error") -> Records:
    return load(path, ROWS, kind, on_bad_row=on_bad_row)


def test_rows_with_such_tokens_are_named_with_token_and_sizes(tmp_path: Path) -> None:
    tokenizer, rows = tokenizer_with_more()
    with pytest.raises(UserError) as caught:
        tokenize(records(tmp_path, "sft"), tokenizer, vocab_size=rows)
    first, second, _ = caught.value.problems
    assert f"row 2: a token without a row in the base's embedding: '<think>' ({rows})" in first
    assert f"the first {rows} of its tokenizer's {rows + 2} tokens" in first
    assert "row 3" in second


def test_prompts_obey_on_bad_row(tmp_path: Path) -> None:
    tokenizer, rows = tokenizer_with_more()
    with pytest.raises(UserError, match="row 3: a token without a row"):
        read_prompts(records(tmp_path, "prompt"), tokenizer, vocab_size=rows)
    data = read_prompts(records(tmp_path, "prompt", "skip"), tokenizer, vocab_size=rows)
    assert (data.n_rows, data.skipped.total) == (2, 1)
    assert data.columns["answer"] == ["4", "<think>carry</think>6"]


@pytest.mark.parametrize("more", [2, None])
def test_a_base_with_enough_rows_takes_them_all(tmp_path: Path, more: int | None) -> None:
    tokenizer, rows = tokenizer_with_more()
    data = tokenize(records(tmp_path, "sft"), tokenizer, vocab_size=None if more is None else rows + more)
    assert data.n_rows == 3

"""A pair that the cut makes equal says nothing, and is a bad row."""

from __future__ import annotations

from typing import Any

import pytest

from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.tokens.tokenize import tokenize
from tests.pipeline.data.tokens.one_row import assistant, records, user

TALE = "a king who went out to look for gold and " * 3


@pytest.mark.parametrize("scored", [False, True], ids=["preferences", "reward"])
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_a_pair_that_parts_beyond_the_cut_is_a_bad_row(truncation: Any, scored: bool) -> None:
    good, bad = (
        (TALE + "won.", TALE + "lost.") if truncation == "keep_start" else ("Once " + TALE, "Now " + TALE)
    )
    row = records([user("Tell.")], [assistant(good)], [assistant(bad)])
    options: dict[str, Any] = {"truncation": truncation, "scored": scored}
    said = r"row 1: chosen equal to rejected: both 64 tokens, cut at max_length"
    with pytest.raises(UserError, match=said):
        tokenize(row, byte_tokenizer(), max_length=64, **options)
    assert tokenize(row, byte_tokenizer(), max_length=400, **options).n_rows == 1
    other = "keep_end" if truncation == "keep_start" else "keep_start"
    assert tokenize(row, byte_tokenizer(), max_length=64, truncation=other, scored=scored).n_rows == 1  # type: ignore[arg-type]


def test_a_pair_that_only_the_end_of_text_tells_apart_is_a_bad_row() -> None:
    row = records(
        [user("Q")], [assistant("4")], [assistant("4")], plain=("Q", "4", "4<|im_end|>"), format="text"
    )
    with pytest.raises(UserError, match="row 1: chosen equal to rejected"):
        tokenize(row, byte_tokenizer())

"""Pairs for a reward model: where their sequences end, and their margins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import UserError
from actors.models.tiny import byte_tokenizer
from pipeline.data.reading.records import load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.tokenize import TokenizedData, tokenize
from tests.equal_to_trl.test_data import CHATML_TEMPLATE

PAIR = {
    "prompt": [{"role": "user", "content": "2+2?"}],
    "chosen": [{"role": "assistant", "content": "It is 4."}],
    "rejected": [{"role": "assistant", "content": "It is five, I believe."}],
}


def scored(path: Path, rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> TokenizedData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    on_bad_row = options.pop("on_bad_row", "error")
    records = load_records([DataSpec(source=str(path), on_bad_row=on_bad_row)], "preference", seed=0)
    return tokenize(records, tokenizer, scored=True, **options)


def test_a_scored_sequence_ends_where_a_sample_would(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML_TEMPLATE.replace("<|im_end|>\n", tokenizer.eos_token + "\n")
    data = scored(tmp_path / "pairs.jsonl", [PAIR], tokenizer).sequences
    ends = data.token_ids[data.offsets[1:] - 1]
    assert (ends == tokenizer.eos_token_id).all(), "the template's line break is left out"
    assert data.loss_mask[data.offsets[1:] - 1].all()
    records = load_records([DataSpec(source=str(tmp_path / "pairs.jsonl"))], "preference", seed=0)
    whole = tokenize(records, tokenizer).sequences
    assert (whole.lengths == data.lengths + 1).all(), "and stays for other stages"


def test_margins_reach_the_batch_in_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [PAIR | {"margin": margin} for margin in (0.5, 2, 1.25)]
    data = scored(tmp_path / "pairs.jsonl", rows, byte_tokenizer())
    assert data.batch([2, 0]).columns["margin"].tolist() == [1.25, 0.5]
    without = scored(tmp_path / "other.jsonl", [PAIR], byte_tokenizer())
    assert without.sequences.columns == {}
    others = scored(tmp_path / "more.jsonl", [row | {"margin": 0.5} for row in rows], byte_tokenizer())
    assert others.fingerprint != data.fingerprint


def test_a_margin_that_is_missing_or_no_number_is_a_bad_row(tmp_path: Path) -> None:
    rows = [PAIR | {"margin": 0.5}, PAIR, PAIR | {"margin": "much"}]
    with pytest.raises(UserError) as caught:
        scored(tmp_path / "pairs.jsonl", rows, byte_tokenizer())
    text = "\n".join(caught.value.problems)
    assert "row 2: missing column: margin, which other rows have" in text
    assert "row 3: wrong type: margin is 'much', not a number" in text
    kept = scored(tmp_path / "pairs.jsonl", rows, byte_tokenizer(), on_bad_row="skip")
    assert kept.n_rows == 1
    assert kept.skipped.total == 2


def test_over_long_pairs_are_cut_and_counted_or_refused_but_never_dropped_in_silence(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "pairs.jsonl", byte_tokenizer()
    whole = scored(path, [PAIR], tokenizer)
    limit = int(whole.lengths.max()) - 4
    cut = scored(path, [PAIR], tokenizer, max_length=limit)
    assert (cut.n_rows, cut.stats.truncated, cut.stats.cut_tokens) == (1, 1, 4)
    assert np.array_equal(cut.lengths, np.minimum(whole.lengths, limit))
    with pytest.raises(UserError, match=r"row 1: longer than max_length"):
        scored(path, [PAIR], tokenizer, max_length=limit, truncation="error")

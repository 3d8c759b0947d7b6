"""Prompt and answer rows become the same tokens and labels as in TRL's own trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.models.tiny import byte_tokenizer
from pipeline.data.reading.records import load_records
from pipeline.data.spec import DataSpec
from pipeline.data.tokens.tokenize import TokenizedData, tokenize
from tests.pipeline.data.tokens.one_row import CHATML

pytestmark = pytest.mark.trl

CHATML_TEMPLATE = CHATML
STRINGS = [
    {"prompt": "2+2? ", "chosen": "It is 4.", "rejected": "5, maybe; maybe not, who knows, ask again"},
    {"prompt": "Grüße, wie geht's? ", "chosen": "gut 👍", "rejected": "schlecht"},
    {"prompt": "a longer prompt that needs more room than the others ", "chosen": "yes", "rejected": "no"},
]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in STRINGS
]


@pytest.fixture(params=["own template", "chatml", "strings"])
def case(request: pytest.FixtureRequest) -> tuple[list[dict[str, Any]], Any]:
    tokenizer = byte_tokenizer()
    if request.param == "chatml":
        tokenizer.chat_template = CHATML_TEMPLATE
    return (STRINGS if request.param == "strings" else MESSAGES), tokenizer


def ours(path: Path, rows: list[dict[str, Any]], kind: str, tokenizer: Any, **options: Any) -> TokenizedData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec(
        source=str(path), format="text" if isinstance(rows[0]["prompt"], str) else "auto", on_bad_row="skip"
    )
    return tokenize(load_records([spec], kind, seed=0), tokenizer, **options)  # type: ignore[arg-type]


def sequences(data: TokenizedData) -> list[tuple[list[int], list[int]]]:
    """(token ids, labels) of each sequence, labels as TRL writes them."""
    found = []
    for start, end in zip(data.sequences.offsets[:-1], data.sequences.offsets[1:], strict=True):
        ids, mask = data.sequences.token_ids[start:end], data.sequences.loss_mask[start:end]
        found.append((ids.tolist(), np.where(mask, ids, -100).tolist()))
    return found


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_prompt_and_completion_rows_equal_sft_trainers(
    case: tuple[list[dict[str, Any]], Any], truncation: str, tmp_path: Path, tiny_base: Path
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in case[0]]
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_length=56,
        truncation_mode=truncation,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = SFTTrainer(
        str(tiny_base), config, train_dataset=Dataset.from_list(rows), processing_class=case[1]
    )
    data = ours(tmp_path / "a.jsonl", rows, "sft", case[1], max_length=56, truncation=truncation)
    theirs = [(row["input_ids"], [-100, *row["labels"][1:]]) for row in trainer.train_dataset]
    assert sequences(data) == theirs


def test_preference_rows_equal_dpo_trainers(
    case: tuple[list[dict[str, Any]], Any], tmp_path: Path, tiny_base: Path
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_length=56, use_cpu=True, bf16=False, report_to="none"
    )
    trainer = DPOTrainer(
        str(tiny_base), args=config, train_dataset=Dataset.from_list(case[0]), processing_class=case[1]
    )
    data = ours(tmp_path / "a.jsonl", case[0], "preference", case[1], max_length=56)
    theirs = []
    for row in trainer.train_dataset:
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            ids = [*row["prompt_ids"], *answer][:56]
            theirs.append((ids, [-100] * len(row["prompt_ids"]) + ids[len(row["prompt_ids"]) :]))
    assert sequences(data) == theirs


def test_conversations_equal_sft_trainers_with_assistant_only_loss(tmp_path: Path, tiny_base: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    turns = [m for row in MESSAGES for m in (*row["prompt"], *row["chosen"])]
    rows = [{"messages": turns}, {"messages": turns[:2]}]
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"), assistant_only_loss=True, use_cpu=True, bf16=False, report_to="none"
    )
    tokenizer = byte_tokenizer()
    trainer = SFTTrainer(
        str(tiny_base), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tokenize(load_records([DataSpec(source=str(path))], "sft", seed=0), tokenizer, max_length=1024)
    assert sequences(data) == [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]

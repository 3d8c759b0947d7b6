"""Prompts that training and held-out data share are counted, whatever the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.reading.layouts import Kind
from pipeline.data.reading.records import Records, load_records
from pipeline.data.reading.shared_prompts import shared_prompts, trained_prompts
from pipeline.data.spec import DataSpec


def records(path: Path, kind: Kind, rows: list[dict[str, Any]]) -> Records:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records([DataSpec(source=str(path))], kind, seed=0)


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    spoken = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *spoken] if system else spoken


HELD_OUT = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"question": " 2+2?\n", "answer": "5"}),
        ("sft", {"messages": turns("2+2?", "4")}),
        ("sft", {"messages": turns("2+2?", "4", "and 3+3?", "6", system="Be brief.")}),
        ("sft", {"prompt": turns("2+2?"), "completion": turns("x", "4")[1:]}),
        ("preference", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
        ("unpaired", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
        ("prompt", {"prompt": "2+2?"}),
    ],
)
def test_a_shared_prompt_is_found_in_every_layout(tmp_path: Path, kind: Kind, row: dict[str, Any]) -> None:
    train = trained_prompts(records(tmp_path / "train.jsonl", kind, [row, row]))
    held_out = records(tmp_path / "test.jsonl", "prompt", HELD_OUT)
    said = f"1 of 2 rows, such as {tmp_path}/test.jsonl row 2, which is {tmp_path}/train.jsonl row 1"
    assert str(shared_prompts(train, held_out)) == said


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("3+3?", "2+2?")},
        {"messages": turns("hi", "hello", "2+2?", "4")},
        {"question": "2+2", "answer": "4"},
        {"text": "2+2?"},
    ],
)
def test_other_prompts_are_not_shared(tmp_path: Path, row: dict[str, Any]) -> None:
    train = trained_prompts(records(tmp_path / "train.jsonl", "sft", [row]))
    assert shared_prompts(train, records(tmp_path / "test.jsonl", "prompt", HELD_OUT)) is None


def test_texts_and_later_turns_are_compared_too(tmp_path: Path) -> None:
    train = trained_prompts(records(tmp_path / "a.jsonl", "sft", [{"text": "A story."}]))
    shared = shared_prompts(train, records(tmp_path / "b.jsonl", "sft", [{"text": "A story.\n"}]))
    assert shared is not None
    talk = turns("hi", "hello", "2+2?", "4", "3+3?", "6")
    train = trained_prompts(records(tmp_path / "a.jsonl", "sft", [{"messages": talk}]))
    shared = shared_prompts(train, records(tmp_path / "b.jsonl", "prompt", [{"prompt": talk[:3]}]))
    assert shared is not None


def test_both_halves_of_a_pair_are_one_row(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}]
    data = records(tmp_path / "a.jsonl", "unpaired", rows)
    shared = shared_prompts(trained_prompts(data), data)
    assert shared is not None
    assert (shared.rows, shared.of) == (1, 1)

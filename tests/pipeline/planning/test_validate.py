"""`raylign validate` says which files each source is, and what held-out data shares with training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.cli.app import main


def rows(path: Path, numbers: range) -> None:
    path.parent.mkdir(exist_ok=True)
    made = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def validated(tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path, test: range) -> str:
    for shard in range(5):
        rows(tmp_path / "sums" / f"train-{shard}.jsonl", range(shard * 10, shard * 10 + 10))
    rows(tmp_path / "sums" / "test.jsonl", test)
    source = str(tmp_path / "sums")
    config = {
        "name": "sums",
        "output_dir": str(tmp_path / "out"),
        "model": {"base": str(base)},
        "stages": {"sft": {"type": "sft", "data": source, "eval_data": {"source": source, "split": "test"}}},
        "eval": {"data": f"{source}/test.jsonl"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["validate", str(path)]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_files_are_listed_and_shared_prompts_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path
) -> None:
    said = validated(tmp_path, capsys, tiny_base, range(47, 60))
    files = "train-0.jsonl, train-1.jsonl, train-2.jsonl and 2 more (5 files)"
    assert f"stages.sft.data: {tmp_path}/sums, 50 rows of split train: {files}" in said
    assert f"stages.sft.eval_data: {tmp_path}/sums, 13 rows of split test: test.jsonl" in said
    assert f"eval.data: {tmp_path}/sums/test.jsonl, 13 rows of split train" in said
    for key in ("stages.sft.eval_data", "eval.data"):
        assert (
            f"warning: {key} has prompts that stages.sft.data has too: 3 of 13 rows, such as "
            f"{tmp_path}/sums/test.jsonl row 1, which is {tmp_path}/sums/train-4.jsonl row 8"
        ) in said


def test_nothing_is_said_where_nothing_is_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path
) -> None:
    assert "warning" not in validated(tmp_path, capsys, tiny_base, range(50, 60))

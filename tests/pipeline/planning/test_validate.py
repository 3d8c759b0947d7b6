"""`raylign validate` says which files each source is, and what held-out data shares with training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from actors.errors import UserError
from pipeline.api import load, validate
from pipeline.cli.app import main
from pipeline.planning.read_graph import read_rows


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


def test_what_is_wrong_with_data_eval_data_metric_and_rewards_is_said_at_once(
    tmp_path: Path, tiny_base: Path
) -> None:
    pair = '{"prompt": "a", "chosen": "b", "rejected": "%s"}\n'
    (tmp_path / "pairs.jsonl").write_text(pair % "c" + pair % "b")
    (tmp_path / "odd.jsonl").write_text('{"colour": "red"}\n')
    good, bad, odd = (str(tmp_path / f"{name}.jsonl") for name in ("pairs", "nowhere", "odd"))
    data = {
        "name": "a",
        "output_dir": str(tmp_path / "out"),
        "model": {"base": str(tiny_base)},
        "stages": {
            "dpo": {"data": [good, bad], "eval_data": [odd, str(tmp_path / "other.jsonl")]},
            "reward": {"data": odd, "eval_data": bad},
            "grpo": {"data": bad, "rewards": ["no_such_module:f", f"{tmp_path}/none"]},
        },
        "eval": {"data": odd, "metric": "no_such_module:g"},
    }
    wanted = [
        "stages.dpo: data source '{tmp}/nowhere.jsonl'",
        "pairs.jsonl row 2",
        "stages.dpo.eval_data: data source '{tmp}/odd.jsonl'",
        "stages.dpo.eval_data: data source '{tmp}/other.jsonl'",
        "stages.reward: data source '{tmp}/odd.jsonl'",
        "stages.reward.eval_data: data source '{tmp}/nowhere.jsonl'",
        "stages.grpo: data source '{tmp}/nowhere.jsonl'",
        "stages.grpo.rewards.0",
        "stages.grpo.rewards.1",
        "eval.metric",
        "eval.data: data source '{tmp}/odd.jsonl'",
    ]
    with pytest.raises(UserError) as refused:
        read_rows(load(data))
    for problems in (validate(data).problems, refused.value.problems):
        said = "\n".join(problems)
        for one in wanted:
            assert one.format(tmp=tmp_path) in said, one


def test_rows_that_the_template_refuses_are_said_of_data_and_eval_data(
    tmp_path: Path, tiny_base: Path
) -> None:
    long = json.dumps({"prompt": "a" * 200, "completion": "b"})
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text(f"{long}\n")
    sft = {"data": f"{tmp_path}/train.jsonl", "eval_data": f"{tmp_path}/held.jsonl"}
    sft |= {"max_length": 50, "truncation_mode": "error"}
    found = validate({"name": "a", "model": {"base": str(tiny_base)}, "stages": {"sft": sft}}).problems
    said = "\n".join(found)
    assert f"stages.sft: {tmp_path}/train.jsonl row 1" in said
    assert f"stages.sft.eval_data: {tmp_path}/held.jsonl row 1" in said

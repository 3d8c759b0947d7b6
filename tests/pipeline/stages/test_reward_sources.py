"""Functions and directories that reward an online stage are found, or named with what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.stages.reward_sources import reward_source_problems


def config(*rewards: Any) -> RunConfig:
    stages = {"reward": {"data": "x"}, "grpo": {"data": "x", "rewards": list(rewards)}}
    loaded, problems = validate({"name": "a", "model": {"base": "b"}, "stages": stages})
    assert loaded is not None, problems
    return loaded


def test_what_can_be_found_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wanted_rewards.py").write_text("def brevity(completions, **columns):\n    return []\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    run = config("exact_match", "reward", "wanted_rewards:brevity", f"{tmp_path}/adapter")
    assert reward_source_problems(run, run.stages) == []


def test_everything_that_is_wrong_is_listed_under_its_key(tmp_path: Path) -> None:
    run = config("no_such_module:f", "exact_match", "os:sep", f"{tmp_path}/nothing")
    problems = reward_source_problems(run, run.stages)
    assert [p.split(":")[0] for p in problems] == [f"stages.grpo.rewards.{i}" for i in (0, 2, 3)]
    assert "cannot be imported" in problems[0]
    assert "not a function" in problems[1]
    assert "holds no reward model" in problems[2]


def test_stages_that_will_not_run_are_not_looked_at() -> None:
    run = config("no_such_module:f")
    assert reward_source_problems(run, ["reward"]) == []

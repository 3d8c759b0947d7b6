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
    monkeypatch.chdir(tmp_path)
    run = config("exact_match", "reward", "wanted_rewards:brevity")
    assert reward_source_problems(run, run.stages) == []


def test_a_directory_has_to_hold_an_adapter_with_a_head(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from actors.models.adapters import SCORE_KEY

    (tmp_path / "adapter_config.json").write_text("{}")
    run = config(str(tmp_path))
    assert "adapter_model.safetensors" in reward_source_problems(run, run.stages)[0]
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "adapter_model.safetensors")
    assert "a policy's adapter" in reward_source_problems(run, run.stages)[0]
    save_file({SCORE_KEY: torch.zeros(1, 2)}, tmp_path / "adapter_model.safetensors")
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

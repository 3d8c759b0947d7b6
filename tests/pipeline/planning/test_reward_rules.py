"""Functions and directories that reward an online stage are found, or named with what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.cluster.spec import RoleSpec
from pipeline.config.load import validate
from pipeline.config.run_config import RunConfig
from pipeline.planning.reward_rules import (
    reward_base_problems,
    reward_column_problems,
    reward_source_problems,
    service_problems,
)
from pipeline.rewards.functions import Samples


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

    from actors.models.lora.adapters import SCORE_KEY

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
    assert "does not exist" in problems[2]


def test_a_column_that_a_reward_asks_for_and_the_data_lack_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asking_rewards.py").write_text(
        "def solved(prompts, completions, solution, hint=None):\n    return []\n"
        "def free(completions, **columns):\n    return []\n"
        "def graded(completions, answer):\n    return []\n"
    )
    monkeypatch.chdir(tmp_path)
    names = ("solved", "free", "graded")
    run = config("exact_match", "reward", *(f"asking_rewards:{name}" for name in names), "nowhere:f")
    stage = run.stages["grpo"]
    assert reward_column_problems("grpo", stage, {"answer": ["1", "2"], "solution": ["", ""]}, 2) == []
    found = reward_column_problems("grpo", stage, {"level": [1, 2]}, 2)
    assert [p.split(":")[0] for p in found] == [f"stages.grpo.rewards.{i}" for i in (0, 2, 4)]
    assert "exact_match compares with `answer`, which the rows lack" in found[0]
    assert "asks for solution, which the data do not have (columns beside the prompt: level)" in found[1]
    assert "`columns: {answer: ...}`" in found[2]
    some = reward_column_problems("grpo", stage, {"answer": ["1", None], "solution": ["", ""]}, 2)
    assert len(some) == 1
    assert "1 of 2 rows lack" in some[0]
    assert reward_column_problems("reward", run.stages["reward"], {}, 2) == []


def test_services_are_looked_up_and_asked_about_a_few_rows(tmp_path: Path) -> None:
    (tmp_path / "judge.txt").write_text("{prompt} {completion} {rubric}")
    url, few = "http://127.0.0.1:9/", {"retries": 0, "timeout_s": 5}
    run = config(
        {"kind": "http", "url": url, "columns": ["answer"], **few},
        {"kind": "judge", "endpoint": url, "model": "m", "prompt": str(tmp_path / "judge.txt"), **few},
        {"kind": "judge", "endpoint": url, "model": "m", "prompt": "no-such-file"},
        {"kind": "code", "column": "checks"},
        {"kind": "http", "url": url, "api_key_env": "A_VARIABLE_THAT_NOBODY_SETS"},
    )
    stage = run.stages["grpo"]
    missing = reward_source_problems(run, ["grpo"])
    assert [p.split(":")[0] for p in missing] == ["stages.grpo.rewards.2", "stages.grpo.rewards.4"]
    assert "'no-such-file' can't be read" in missing[0]
    assert "A_VARIABLE_THAT_NOBODY_SETS is not set" in missing[1]
    lacking = reward_column_problems("grpo", stage, {"level": ["1"]}, 1)
    assert [p.split(" asks for ")[1].split(",")[0] for p in lacking] == ["answer", "rubric", "checks"]
    samples = Samples(["q"], ["a"], [[1]], {"answer": ["1"], "rubric": ["r"], "checks": ["c"]})
    asked = service_problems("grpo", stage, lambda: samples)
    assert [p.split(":")[0] for p in asked] == ["stages.grpo.rewards.0", "stages.grpo.rewards.1"]
    assert all("asked about 1 samples" in p and "Cannot connect" in p for p in asked)


def test_a_reward_model_of_another_base_is_refused_and_one_of_this_base_is_not(
    tmp_path: Path, tiny_base: Path
) -> None:
    import torch

    from actors.models.base.loading import load_base, resolve_base
    from actors.models.lora.adapters import attach_lora, save_adapter
    from actors.models.spec import LoraSpec, ModelSpec
    from actors.models.tiny import write_tiny_base

    write_tiny_base(tmp_path / "other", seed=1, num_hidden_layers=2)
    for name, base in (("mine", tiny_base), ("its", tmp_path / "other")):
        model = attach_lora(load_base(ModelSpec(base=str(base))), LoraSpec(r=4), "policy", 0)
        head = torch.zeros(1, model.get_base_model().config.hidden_size)
        save_adapter(model, "policy", tmp_path / name, head)
    run = config(str(tmp_path / "mine"), str(tmp_path / "its"), str(tmp_path / "nowhere"))
    problems = reward_base_problems(run, run.stages, resolve_base(ModelSpec(base=str(tiny_base))))
    assert len(problems) == 1
    assert problems[0].startswith("stages.grpo.rewards.1: ")
    assert "weights differ" in problems[0]
    run = config(str(tmp_path / "mine"))
    assert run.model.lora is not None
    run.model.lora.targets = ["attention", "router"]
    (problem,) = reward_base_problems(run, run.stages, resolve_base(ModelSpec(base=str(tiny_base))))
    assert "on one base these must be the same" in problem
    run.roles.reward = RoleSpec()
    assert reward_base_problems(run, run.stages, resolve_base(ModelSpec(base=str(tiny_base)))) == []


def test_stages_that_will_not_run_are_not_looked_at() -> None:
    run = config("no_such_module:f")
    assert reward_source_problems(run, ["reward"]) == []

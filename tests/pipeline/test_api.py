"""The way in from Python: the command line's own objects, errors that are raised, nothing heavy too early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pipeline
from actors.errors import UserError
from pipeline import load, plan, run, validate
from pipeline.api import result_of
from pipeline.artifacts.run_directory import RunDirectory
from pipeline.config.load import load_config

HEAVY = ("torch", "ray", "transformers", "datasets", "vllm", "trl", "peft", "matplotlib", "pydantic", "typer")
CONFIG: dict[str, Any] = {
    "name": "a",
    "model": {"base": "builtin:tiny-moe"},
    "stages": {"sft": {"data": {"source": "builtin:arithmetic", "split": "train[:64]"}, "max_steps": 2}},
}


def test_importing_the_package_and_its_names_loads_nothing_heavy() -> None:
    shown = f"print([m for m in {HEAVY} if m in sys.modules])"
    code = f"import sys; from pipeline import run, validate, plan; {shown}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_names_that_the_package_offers_are_there_and_others_are_not() -> None:
    assert all(callable(getattr(pipeline, name)) for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        pipeline.runs  # noqa: B018


def test_a_mapping_a_file_and_a_loaded_config_are_the_same_run(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        'name: a\nmodel: {base: "builtin:tiny-moe"}\n'
        "stages: {sft: {data: {source: 'builtin:arithmetic', split: 'train[:64]'}, max_steps: 2}}\n"
    )
    loaded = load(CONFIG)
    assert loaded == load(tmp_path / "a.yaml") == load(str(tmp_path / "a.yaml")) == load(loaded)
    demo = load_config(repository / "configs" / "demo.yaml")
    faster = load(demo, ["stages.dpo.beta=0.2"])
    assert faster.stages["dpo"].beta == 0.2
    assert faster == load_config(repository / "configs" / "demo.yaml", ["stages.dpo.beta=0.2"])


def test_what_is_wrong_with_a_config_is_raised_or_found_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = ["stages.sft.batch_size=0", "model.lora.r=0"]
    for call in (load, plan, run):
        with pytest.raises(UserError) as caught:
            call(CONFIG, wrong)
        assert len(caught.value.problems) == 2
    assert validate(CONFIG, wrong).problems == caught.value.problems
    with pytest.raises(UserError, match=r"no stage is named 'sftt'.*did you mean"):
        run(CONFIG, until="sftt")
    assert not list(tmp_path.iterdir())


def test_validate_finds_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = validate(CONFIG)
    assert findings.problems == []
    assert findings.targets is not None
    assert findings.stages[0][:4] == ["sft", "base", "", "64"]
    missing = validate(CONFIG, ["stages.sft.data=nowhere.jsonl", "model.base=./nothing"])
    assert [problem.partition(":")[0] for problem in missing.problems] == ["model.base", "stages.sft"]


def test_plan_says_what_each_role_asks_for(repository: Path) -> None:
    found = plan(repository / "configs" / "ppo-moe-8gpu.yaml")
    config = load_config(repository / "configs" / "ppo-moe-8gpu.yaml")
    assert set(found.roles) == {"policy", "reference", "critic", "reward", "rollout"}
    for name, role in found.roles.items():
        spec = getattr(config.roles, name)
        assert (role.shares, role.processes) == (spec.share, 0 if spec.share else spec.workers)
        assert role.resources.get("GPU", 0) == (0 if spec.share else spec.workers * spec.gpus)
    assert found.resources["GPU"] == 8
    assert found.processes == sum(role.processes for role in found.roles.values())
    assert "On the cluster this would run" in found.text


def test_a_result_is_what_the_run_directory_holds(tmp_path: Path) -> None:
    stages = {"sft": CONFIG["stages"]["sft"], "more": CONFIG["stages"]["sft"] | {"type": "sft"}}
    config = load(CONFIG | {"stages": stages, "output_dir": str(tmp_path / "run")})
    before = result_of(config)
    assert [stage.state for stage in before.stages.values()] == [None, None]
    with RunDirectory(config.output_dir, config.name).opened() as directory:
        (directory.stage("sft") / "adapter").mkdir(parents=True)
        (directory.stage("more") / "adapter").mkdir(parents=True)
        directory.record_stage("sft", state="done", seconds=2.5, metrics={"loss": 0.5})
        directory.record_stage("more", state="failed")
    result = result_of(config, stopped=True)
    assert result.stopped
    assert (result.directory, result.report) == (tmp_path / "run", tmp_path / "run" / "report.html")
    assert result.stages["sft"].weights == tmp_path / "run" / "sft" / "adapter"
    assert (result.stages["sft"].metrics, result.stages["sft"].seconds) == ({"loss": 0.5}, 2.5)
    assert (result.stages["more"].state, result.stages["more"].weights) == ("failed", None)

"""Every mistake a user can make: one clear message, exit code 2, nothing started, nothing lost."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.artifacts.run_directory import RunDirectory
from pipeline.cli.app import main

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def no_ray_of_other_tests() -> None:
    """So that a Ray found running afterwards was started by a command of this module."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """A small run that would work, on a cluster that is there: none is started for it, and nobody but this
    process looks at the base."""
    return {
        "name": "bad",
        "output_dir": str(tmp_path / "out"),
        "ray": {"address": "auto"},
        "model": {"base": str(tiny_base), "lora": {"r": 4, "lora_alpha": 8}},
        "stages": {
            "sft": {"data": {"source": "builtin:arithmetic", "max_rows": 16}, "max_steps": 2, "batch_size": 4}
        },
    }


@pytest.fixture
def local(config: dict[str, Any]) -> dict[str, Any]:
    """The same on a local cluster, which starts while the data is read; a rank looks at the base."""
    return {key: section for key, section in config.items() if key != "ray"}


def refused(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str = "run"
) -> str:
    """What the command says; it must exit with 2, without a traceback, and leave no Ray behind."""
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(config))
    code = main([verb, str(path)])
    said = "".join(capfd.readouterr())
    assert code == 2, said
    assert "Traceback" not in said
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()
    return " ".join(said.split())


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_unknown_keys_and_wrong_types_are_listed_together(config, tmp_path, capfd) -> None:
    config["stages"]["sft"]["learning_rat"] = 1
    config["stages"]["sft"]["batch_size"] = "many"
    config["modle"] = {}
    said = refused(config, tmp_path, capfd)
    assert "learning_rate" in said
    assert "batch_size" in said
    assert "model" in said


def test_a_missing_file_is_named(config, tmp_path, capfd) -> None:
    config["stages"]["sft"]["data"] = str(tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in refused(config, tmp_path, capfd)


def test_a_hub_id_without_network_says_so(config, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config["stages"]["sft"]["data"] = "nobody/such-data"
    assert "nobody/such-data" in refused(config, tmp_path, capfd)


def test_an_empty_data_set_is_refused(config, tmp_path, capfd) -> None:
    config["stages"]["sft"]["data"] = jsonl(tmp_path / "empty.jsonl", [])
    assert "no rows" in refused(config, tmp_path, capfd)


def test_data_of_another_layout_than_the_stage_needs(config, tmp_path, capfd) -> None:
    rows = [{"question": "1+1?", "answer": "2"}]
    config["stages"] = {"dpo": {"data": jsonl(tmp_path / "qa.jsonl", rows)}}
    said = refused(config, tmp_path, capfd)
    assert "stages.dpo" in said
    assert "chosen" in said


def test_every_bad_row_is_named(config, tmp_path, capfd) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, {"prompt": "a"}]
    config["stages"]["sft"]["data"] = jsonl(tmp_path / "rows.jsonl", rows)
    said = refused(config, tmp_path, capfd)
    assert "rows.jsonl row 2: empty answer" in said
    assert "row 3: missing column" in said


def test_a_base_that_is_no_causal_lm(config, tiny_base, tmp_path, capfd) -> None:
    base = tmp_path / "bert"
    shutil.copytree(tiny_base, base)
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32}
    (base / "config.json").write_text(json.dumps(bert))
    config["model"]["base"] = str(base)
    assert "model.base" in refused(config, tmp_path, capfd)


def test_a_base_that_is_not_there(config, tmp_path, capfd) -> None:
    config["model"]["base"] = str(tmp_path / "no-model")
    assert "no-model" in refused(config, tmp_path, capfd)


def test_lora_targets_that_match_nothing(local, tmp_path, capfd) -> None:
    local["model"]["lora"]["targets"] = ["attention", "shared_experts"]
    said = refused(local, tmp_path, capfd)
    assert "shared_experts" in said
    assert "attention" in said


def test_an_adapter_of_another_base(config, tiny_base, tmp_path, capfd) -> None:
    from actors.models.base.loading import load_base
    from actors.models.lora.adapters import attach_lora, save_adapter
    from actors.models.spec import LoraSpec, ModelSpec
    from actors.models.tiny import write_tiny_base

    other = tmp_path / "other-base"
    write_tiny_base(other, seed=1, num_hidden_layers=2)
    model = attach_lora(load_base(ModelSpec(base=str(other))), LoraSpec(r=4), "policy", 0)
    save_adapter(model, "policy", tmp_path / "adapter")
    adapter_config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(adapter_config.read_text())
    adapter_config.write_text(json.dumps(settings | {"base_model_name_or_path": str(tiny_base)}))
    config["model"]["base"] = str(tmp_path / "adapter")
    assert "weights differ" in refused(config, tmp_path, capfd)


def test_more_resources_than_the_machine_has(local, tmp_path, capfd) -> None:
    local["roles"] = {"policy": {"workers": 64, "cpus": 2}}
    said = refused(local, tmp_path, capfd)
    assert "128" in said
    assert "policy" in said


def test_the_directory_of_another_run(config, tmp_path, capfd) -> None:
    with RunDirectory(tmp_path / "out", "somebody").opened():
        pass
    assert "belongs to the run 'somebody'" in refused(config, tmp_path, capfd)


def test_a_second_run_on_the_same_directory(config, tmp_path, capfd) -> None:
    with RunDirectory(tmp_path / "out", "bad").opened():
        assert "in use by process" in refused(config, tmp_path, capfd)


def test_a_directory_that_cannot_be_written_ends_with_1(config, tmp_path, capfd) -> None:
    config["output_dir"] = "/proc/raylign"
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["run", str(path)]) == 1
    assert "cannot write /proc/raylign" in " ".join("".join(capfd.readouterr()).split())


def test_a_corrupt_manifest_is_named(config, tmp_path, capfd) -> None:
    with RunDirectory(tmp_path / "out", "bad").opened():
        pass
    (tmp_path / "out" / "sft").mkdir()
    (tmp_path / "out" / "sft" / "manifest.json").write_text("{")
    said = refused(config, tmp_path, capfd)
    assert "sft/manifest.json: the manifest cannot be read" in said
    assert "--fresh" in said


@pytest.fixture
def online(config: dict[str, Any]) -> dict[str, Any]:
    """The same with a small online stage."""
    data = {"source": "builtin:arithmetic", "split": "prompts", "max_rows": 16}
    config["stages"]["grpo"] = {"data": data, "rewards": ["exact_match"], "max_steps": 2, "batch_size": 8}
    return config


def test_a_reward_without_the_column_that_it_compares_with(online, tmp_path, capfd) -> None:
    online["stages"]["grpo"]["data"] = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "1+1?"}])
    said = refused(online, tmp_path, capfd)
    assert "stages.grpo.rewards.0: exact_match compares with `answer`, which the rows lack" in said
    assert "stages.grpo.rewards.0: exact_match compares" in refused(online, tmp_path, capfd, "validate")


def test_rewards_that_cannot_be_imported_or_are_no_reward_models(online, tmp_path, capfd) -> None:
    online["stages"]["grpo"]["rewards"] = ["nowhere:f", f"{tmp_path}/nothing"]
    said = refused(online, tmp_path, capfd)
    assert "stages.grpo.rewards.0: 'nowhere:f' cannot be imported" in said
    assert "stages.grpo.rewards.1: " in said
    assert f"directory '{tmp_path}/nothing' does not exist" in said


def test_what_the_configuration_of_an_online_stage_refuses(online, tmp_path, capfd) -> None:
    online["stages"]["grpo"] |= {"top_p": 0.9, "critic_init": "sft"}
    online["roles"] = {"critic": {"share": "nobody"}}
    said = refused(online, tmp_path, capfd)
    for at in ("stages.grpo.top_p", "stages.grpo.critic_init", "roles.critic.share"):
        assert at in said


def test_prompts_that_leave_no_room_for_a_completion(online, tmp_path, capfd) -> None:
    online["stages"]["grpo"] |= {"max_length": 20, "max_completion_length": 16}
    said = refused(online, tmp_path, capfd)
    assert "max_length - max_completion_length leaves 4" in said


def test_samples_that_an_engine_does_not_hold(online, tmp_path, capfd) -> None:
    online["stages"]["grpo"] |= {"max_length": None, "max_completion_length": 16}
    online["roles"] = {"rollout": {"engine": {"max_model_len": 24}}}
    assert "an engine holds 24" in refused(online, tmp_path, capfd)


def test_prompts_given_to_a_reward_model(online, tmp_path, capfd) -> None:
    online["stages"] = {"reward": {"data": online["stages"]["grpo"]["data"]}}
    assert "no layout for a dpo or reward stage" in refused(online, tmp_path, capfd)


def test_a_metric_that_asks_for_what_an_evaluation_does_not_have(
    config, tmp_path, capfd, monkeypatch
) -> None:
    (tmp_path / "asking_metric.py").write_text("def f(completions, trainer_state, **rest):\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = {"source": "builtin:arithmetic", "split": "test"}
    config["eval"] = {"data": data, "metric": "asking_metric:f"}
    assert "asks for trainer_state, which an evaluation does not have" in refused(config, tmp_path, capfd)


def test_a_metric_that_cannot_be_imported(config, tmp_path, capfd) -> None:
    config["eval"] = {"data": {"source": "builtin:arithmetic", "split": "test"}, "metric": "nowhere:score"}
    assert "nowhere:score" in refused(config, tmp_path, capfd)

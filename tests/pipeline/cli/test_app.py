"""The command line: help, exit codes, and that its import stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from pipeline.cli.app import app, main

VERBS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
HEAVY = ("torch", "ray", "transformers", "datasets", "vllm", "trl", "peft", "matplotlib")


def test_every_verb_of_the_issue_is_there() -> None:
    assert set(VERBS) == {
        "init", "validate", "plan", "run", "submit", "status", "logs", "stop",
        "inspect", "eval", "chat", "serve", "merge", "report", "compare", "env", "scale",
    }  # fmt: skip


def test_init_knows_every_type_of_stage() -> None:
    from pipeline.cli.runs import STAGES
    from pipeline.stages.specs.registry import STAGE_TYPES

    assert sorted(STAGES.split(", ")) == sorted(STAGE_TYPES)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"raylign {verb}" in text


def test_the_version_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.cli.environment import raylign_version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"raylign {raylign_version()}\n"


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = (
        f"import sys, pipeline.cli.app, pipeline.config.load; print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_value_under_its_old_name_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path), "--stages", "sft"]) == 0
    assert "`beside`" not in path.read_text()
    capsys.readouterr()
    assert main(["validate", str(path), "model.lora.expert_impl=beside"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "beside" in line]
    new = "model.lora.expert_impl: 'beside' is now called 'unmerged'; the old name still works"
    assert said == [f"warning: {path}: {new}"]


def test_init_writes_a_config_and_replaces_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path), "--base", "some/base"]) == 0
    assert yaml.safe_load(path.read_text())["name"] == "mine"
    path.write_text("precious")
    assert main(["init", str(path)]) == 2
    assert path.read_text() == "precious"
    assert main(["init", str(path), "--force"]) == 0
    assert main(["init", str(tmp_path / "schema.json"), "--schema"]) == 0
    assert "json-schema.org" in (tmp_path / "schema.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["frobnicate"], "No such command"),
        (["run", "nowhere.yaml"], "no such file"),
        (["validate", "nowhere.yaml"], "no such file"),
        (["report", "."], "no run.json"),
        (["stop", "x", "--timeout", "0"], "--timeout"),
    ],
)
def test_mistakes_end_with_code_2_and_no_traceback(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_a_bad_config_lists_all_of_its_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: a\nmodel: {base: b, lora: {lora_alfa: 1}}\nstages: {sft: {data: x, batch_size: 0}}\nseeed: 1"
    )
    for verb in ("run", "validate", "submit", "eval"):
        assert main([verb, str(path)]) == 2
        text = capsys.readouterr().err
        assert "3 problems" in text
        assert "did you mean `lora_alpha`?" in text
        assert "did you mean `seed`?" in text


def test_until_names_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nmodel: {base: b}\nstages: {sft: {data: x}}")
    assert main(["run", str(path), "--until", "stf"]) == 2
    assert "did you mean 'sft'?" in capsys.readouterr().err


def test_validate_lists_model_data_and_directory_together(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert main(["init", "run.yaml", "--stages", "sft,dpo"]) == 0
    few = [f"stages.{stage}.data.max_rows=64" for stage in ("sft", "dpo")] + [f"model.base={tiny_base}"]
    assert main(["validate", "run.yaml", *few]) == 0
    fine = capsys.readouterr().out
    assert "gate_up_proj" in fine
    assert "500 prompts" in fine
    changes = [
        "output_dir=taken",
        "stages.sft.data=none.jsonl",
        "model.lora.targets=[mlp]",
        "stages.dpo.data.split=train",
    ]
    assert main(["validate", "run.yaml", *few, *changes]) == 2
    text = capsys.readouterr().err
    for key in ("output_dir", "model.lora.targets", "stages.sft", "stages.dpo"):
        assert f"- {key}" in text
    assert not (tmp_path / "runs").exists()


def test_validate_says_what_a_sync_sends_and_which_reward_cannot_be_found(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "run.yaml", "--stages", "reward,ppo"]) == 0
    few = [f"stages.{stage}.data.max_rows=64" for stage in ("reward", "ppo")] + [f"model.base={tiny_base}"]
    assert main(["validate", "run.yaml", *few, "stages.ppo.max_length=64"]) == 0
    fine = capsys.readouterr().out
    assert "ppo: a sync sends " in fine
    assert "critic: on policy's processes" in fine
    rewards = "stages.ppo.rewards=[reward, nowhere:f, ./nothing]"
    assert main(["validate", "run.yaml", *few, rewards]) == 2
    text = capsys.readouterr().err
    assert "- stages.ppo.rewards.1: 'nowhere:f' cannot be imported" in text
    assert "- stages.ppo.rewards.2: directory 'nothing' does not exist" in text


def test_validate_names_the_placeholders_of_a_starter_and_what_share_of_rows_is_used(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "run.yaml")
    assert main(["init", path, "--base", str(tiny_base), "--stages", "sft,dpo,grpo"]) == 0
    assert main(["validate", path]) == 2
    text = capsys.readouterr().err
    places = {"stages.sft": "ANSWERS", "stages.dpo": "PAIRS", "stages.grpo": "PROMPTS"}
    for key, what in {**places, "eval.data": "HELD_OUT_PROMPTS"}.items():
        assert f"- {key}: data source 'YOUR_{what}': a placeholder; write your own" in text
    rows = "{source: 'builtin:arithmetic', split: %s, max_rows: 2000}"
    own = [
        f"stages.{name}.data={rows % split}"
        for name, split in (("sft", "train"), ("dpo", "preference"), ("grpo", "prompts"))
    ]
    own += ["eval=null", "stages.sft.max_steps=100", "stages.sft.batch_size=8", "stages.grpo.max_steps=3"]
    own += ["stages.grpo.num_generations=8", "output_dir=" + str(tmp_path / "out")]
    own += ["stages.grpo.max_length=100", "stages.grpo.max_completion_length=16"]
    assert main(["validate", path, *own]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "sft: 100 steps x 8 = 800 of 2,000 rows (40 %)" in lines
    assert "dpo: 63 steps x 32, 1 pass over all 2,000 rows" in lines
    assert "grpo: 3 steps x 8 = 24 of 2,000 prompts (1.2 %)" in lines


def test_env_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in ("python", "torch", "cores", "memory", "gpus"):
        assert word in text


def test_chat_finds_the_last_finished_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.cli.models import result_of
    from pipeline.config.load import load_config

    path = tmp_path / "run.yaml"
    path.write_text(f"name: a\noutput_dir: {tmp_path}/out\nmodel: {{base: b}}\nstages: {{sft: {{data: x}}}}")
    config = load_config(path)
    assert result_of(config, "base") == "b"
    assert main(["chat", str(path)]) == 2
    assert "holds no result yet" in capsys.readouterr().err
    (tmp_path / "out" / "sft" / "adapter").mkdir(parents=True)
    assert result_of(config, None).endswith("out/sft/adapter")


def test_a_merge_that_rounds_the_training_away_names_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from actors.models.base.loading import load_base
    from actors.models.lora.adapters import attach_lora, save_adapter
    from actors.models.spec import LoraSpec, ModelSpec
    from actors.models.tiny import write_tiny_base

    base = write_tiny_base(tmp_path / "base", num_hidden_layers=1)
    peft = attach_lora(load_base(ModelSpec(base=str(base))), LoraSpec(r=2), "default", 0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-6)
    save_adapter(peft, "default", tmp_path / "adapter")
    said = {}
    for dtype in ("bfloat16", "float32"):
        arguments = ["merge", str(tmp_path / "adapter"), str(tmp_path / dtype), "--dtype", dtype]
        assert main(arguments) == 0
        said[dtype] = capsys.readouterr().out
    assert "`--dtype float32` keeps it" in said["bfloat16"]
    assert "keeps it" not in said["float32"]


def test_chat_refuses_a_temperature_that_vllm_would_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "base", "--prompt", "1+1=", "--temperature", "0.005"]) == 2
    assert "--temperature 0.005: vLLM would draw at 0.01; write 0.01 to 2, or 0" in capsys.readouterr().err


def test_inspect_ends_with_1_where_a_run_would_stop_at_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, config = tmp_path / "a.jsonl", tmp_path / "run.yaml"
    data.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "2+2?", "answer": ""}\n')
    assert main(["inspect", str(data)]) == 1
    stages = {"sft": {"data": {"source": str(data), "on_bad_row": "skip"}}}
    config.write_text(yaml.safe_dump({"name": "a", "model": {"base": "builtin:tiny-moe"}, "stages": stages}))
    assert main(["inspect", str(config)]) == 0
    assert "row 2: empty answer" in capsys.readouterr().out
    data.write_text('{"question": "1+1?", "answer": "2"}\n')
    assert main(["inspect", str(data)]) == 0
    assert main(["inspect", str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.parametrize(
    ("mean", "effect", "unchanged", "said"),
    [
        (0.2, 1.0, 0.0, "changes 20% as much|that is much: `--dtype float32` keeps it"),
        (0.01, 1.0, 0.5, "changes 1% as much|too small for bfloat16; `--dtype float32` keeps them"),
        (0.01, 1.0, 0.0, "changes 1% as much|little is lost: the merged model can be used as it is"),
    ],
)
def test_a_merge_into_16_bits_says_what_its_differences_mean(
    mean: float, effect: float, unchanged: float, said: str
) -> None:
    from actors.models.lora.merge import MergeReport
    from pipeline.cli.models import differences

    lines = differences(
        MergeReport("m", "bfloat16", 3, 1.0, mean, mean / 2, effect, unchanged, unchanged, 1.0)
    )
    assert all(part in "\n".join(lines) for part in said.split("|"))
    exact = differences(MergeReport("m", "float32", 3, 1e-6, 1e-7, 1e-7, effect, 0.0, unchanged, 1.0))
    assert len(exact) == 2

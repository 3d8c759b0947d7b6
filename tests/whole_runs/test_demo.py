"""SFT -> DPO on real Ray and real vLLM, through the command line, and what survives kill -9."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.whole_runs.runs import (
    adapter_digest,
    command_of,
    complete,
    kill_when,
    lines_of,
    raylign,
    start,
    when,
)

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]


def config(base: Path, output: Path, **sections: Any) -> dict[str, Any]:
    stage = {"batch_size": 8, "max_steps": 6, "save_steps": 2, "learning_rate": 1e-3, "max_length": 128}
    data = {"source": "builtin:arithmetic", "max_rows": 64}
    return {
        "name": "e2e",
        "output_dir": str(output),
        "seed": 3,
        "model": {"base": str(base), "lora": {"r": 4, "lora_alpha": 8}},
        "stages": {
            "sft": {"data": data | {"split": "train"}, **stage},
            "dpo": {"data": data | {"split": "preference"}, **stage},
        },
        "roles": {"policy": {"workers": 2}, "reference": {"workers": 1}},
        **sections,
    }


@pytest.fixture(scope="module")
def finished_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with evaluation, uninterrupted."""
    path = tmp_path_factory.mktemp("whole")
    evaluation = {
        "data": {"source": "builtin:arithmetic", "split": "test"},
        "max_rows": 20,
        "sampling": {"max_tokens": 8},
    }
    complete(command_of(path, config(tiny_base, path / "run", eval=evaluation)), path)
    return path / "run"


def test_files_of_a_run_name_no_module_of_the_code(finished_run: Path) -> None:
    """So code may move, and a finished run stays finished."""
    written = [p for suffix in ("json", "jsonl", "yaml") for p in finished_run.rglob(f"*.{suffix}")]
    assert any(path.name == "manifest.json" for path in written)
    modules = re.compile(r"\b(actors|pipeline)[./][a-z_]+")
    assert {p.name: modules.findall(p.read_text()) for p in written if modules.search(p.read_text())} == {}


def test_a_run_leaves_what_the_house_promises(finished_run: Path) -> None:
    state = json.loads((finished_run / "run.json").read_text())
    assert {name: stage["state"] for name, stage in state["stages"].items()} == {"sft": "done", "dpo": "done"}
    assert set(state["eval"]) == {"base", "sft", "dpo"}
    assert state["eval"]["dpo"]["n"] == 20
    for stage in ("sft", "dpo"):
        assert (finished_run / stage / "manifest.json").is_file()
        assert [line["step"] for line in lines_of(finished_run, stage)] == [1, 2, 3, 4, 5, 6]
    assert (finished_run / "report.html").is_file()
    assert (finished_run / "config.yaml").is_file()
    assert list((finished_run / "logs").glob("policy-1*"))


def test_the_first_dpo_loss_is_ln_2_after_lora_sft(finished_run: Path) -> None:
    first = lines_of(finished_run, "dpo")[0]
    manifest = json.loads((finished_run / "dpo" / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"sft", "reference"}
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)


def test_the_adapter_loads_in_plain_peft(finished_run: Path, tiny_base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    ids = torch.arange(40, 60)[None]
    before = model(ids).logits
    tuned = PeftModel.from_pretrained(model, finished_run / "dpo" / "adapter")
    assert (tuned(ids).logits - before).abs().max() > 1e-3


def test_dpo_from_an_adapter_has_that_adapter_as_reference(finished_run: Path, tmp_path: Path) -> None:
    content = config(finished_run / "sft" / "adapter", tmp_path / "run")
    content["stages"] = {"dpo": content["stages"]["dpo"] | {"max_steps": 1}}
    complete(command_of(tmp_path, content), tmp_path)
    first = lines_of(tmp_path / "run", "dpo")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_a_finished_run_is_skipped_and_says_so(finished_run: Path) -> None:
    began = time.monotonic()
    result = raylign("run", str(finished_run.parent / "run.yaml"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sft: already done, skipped" in result.stdout
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_run_killed_at_several_points_ends_with_the_same_adapters(
    finished_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = command_of(tmp_path, config(tiny_base, run))
    moments = {
        "while a step of SFT runs": lambda: (run / "sft" / "checkpoint-2").exists(),
        "in the middle of a save": lambda: any(
            (run / "sft" / name).exists() for name in (".checkpoint-4.tmp", "checkpoint-4")
        ),
        "while DPO trains": lambda: (run / "dpo" / "checkpoint-2").exists(),
    }
    for reached in moments.values():
        kill_when(command, tmp_path, reached)
    assert "continues from checkpoint-" in complete(command, tmp_path)
    for stage in ("sft", "dpo"):
        assert adapter_digest(run, stage) == adapter_digest(finished_run, stage), stage


@pytest.mark.slow
def test_a_longer_stage_goes_on_and_leaves_out_a_damaged_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    def stage_of(steps: int, output: str) -> list[str]:
        content = config(tiny_base, tmp_path / output, roles={"policy": {"workers": 1}})
        sft = content["stages"]["sft"] | {"max_steps": steps, "lr_scheduler_type": "constant"}
        return command_of(tmp_path / f"{output}-{steps}", content | {"stages": {"sft": sft}})

    complete(stage_of(4, "run"), tmp_path)
    file = tmp_path / "run" / "sft" / "checkpoint-4" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shutil.copytree(file.parent, file.parent.with_name("checkpoint-4-backup"))
    said = complete(stage_of(6, "run"), tmp_path)
    assert "sft: continues from checkpoint-2, since checkpoint-4 is damaged" in said
    assert said.index(str(file)) < said.index("continues from")
    assert (tmp_path / "run" / "sft" / "checkpoint-4-backup").is_dir()
    complete(stage_of(6, "straight"), tmp_path)
    assert adapter_digest(tmp_path / "run", "sft") == adapter_digest(tmp_path / "straight", "sft")


def test_a_stop_saves_and_the_same_command_goes_on(
    finished_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    content = config(tiny_base, run)
    content["stages"] = {"sft": content["stages"]["sft"]}
    command, log = command_of(tmp_path, content), run / "sft" / "metrics.jsonl"
    process = start(command, tmp_path)
    when(process, lambda: log.exists() and bool(log.read_text()))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    if process.returncode != 0:  # 0: the last step was already under way
        assert process.returncode == 75, output[-3000:]
        assert "stopped after saving" in output
        complete(command, tmp_path)
    assert adapter_digest(run, "sft") == adapter_digest(finished_run, "sft")

"""Reward model -> PPO on real Ray, real vLLM and real weight syncs, and what survives lost processes.

One uninterrupted run is the measure: whatever dies on the way, the adapter that comes out is the same.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.artifacts import file_digest

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "tiny-moe"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
"""The runs start where their reward function is; the project itself need not be installed."""
REWARD = '''
def digits(completions, answer, **columns):
    """The share of characters that are digits; the true answer is worth 1 more."""
    texts = [c[-1]["content"] for c in completions]
    share = [sum(x.isdigit() for x in text) / max(1, len(text)) for text in texts]
    return [s + (text.strip() == str(a)) for s, text, a in zip(share, texts, answer)]
'''
UNEQUAL = re.compile(
    r"^(time/|sync/|mismatch/|moe/engine_|step_seconds|tokens_per_second|critic/tokens_per_second)"
)
"""Metrics that a repeated run may have otherwise: times, and what engines say or count for themselves."""


def config(output: Path, engines: int = 1) -> dict[str, Any]:
    data = {"source": "builtin:arithmetic", "max_rows": 64}
    return {
        "name": "online",
        "output_dir": str(output),
        "seed": 5,
        "model": {"base": str(BASE), "lora": {"r": 4, "lora_alpha": 8}},
        "stages": {
            "reward": {
                "data": data | {"split": "preference"},
                "batch_size": 8,
                "max_steps": 2,
                "max_length": 64,
            },
            "ppo": {
                "data": data | {"split": "prompts"},
                "rewards": ["shaped:digits", {"source": "reward", "weight": 0.5}],
                "batch_size": 16,
                "steps_per_generation": 2,
                "num_iterations": 2,
                "num_generations": 2,
                "max_completion_length": 8,
                "max_length": 64,
                "max_steps": 5,
                "save_steps": 2,
                "learning_rate": 1e-3,
                "kl_target": 0.05,
                "kl_horizon": 100,
            },
        },
        "roles": {"policy": {"workers": 2}, "rollout": {"workers": engines}},
    }


def command_for(directory: Path, engines: int = 1) -> list[str]:
    directory.mkdir(exist_ok=True)
    (directory / "shaped.py").write_text(REWARD)
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(config(directory / "run", engines), sort_keys=False))
    return [sys.executable, "-m", "pipeline", "run", str(path)]


def complete(command: list[str], directory: Path) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=directory, env=ENVIRONMENT, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]


def repeatable(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not UNEQUAL.match(k)} for line in metrics(run)]


def adapter_digest(run: Path) -> str:
    return file_digest(run / "ppo" / "adapter" / "adapter_model.safetensors")


def calls(run: Path, who: str, method: str) -> int:
    """How many calls of a method a process has finished, by its trace; all its lives together."""
    path = run / "logs" / "trace" / f"{who}.jsonl"
    return path.read_text().count(f'"method": "{method}"') if path.is_file() else 0


def has_done(run: Path, who: str, method: str, times: int) -> Callable[[], bool]:
    return lambda: calls(run, who, method) == times


def pid_of(run: Path, who: str) -> int:
    """Process id of the latest life of a process, by its log."""
    return int(re.findall(rf"--- {who} pid (\d+)", (run / "logs" / f"{who}.log").read_text())[-1])


def when(process: subprocess.Popen[str], reached: Callable[[], bool], limit: float = 300) -> None:
    deadline = time.monotonic() + limit
    while not reached():
        assert process.poll() is None, f"the run ended with {process.returncode} before the moment"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start(command: list[str], directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=directory,
        env=ENVIRONMENT,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end; its directory."""
    directory = tmp_path_factory.mktemp("whole")
    complete(command_for(directory), directory)
    return directory / "run"


def test_every_step_is_checked_and_logged(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["sync/version"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert line["mismatch/max"] < 1e-4
        assert line["sync/probe_max"] < 1e-4
        assert {"rewards/digits/mean", "rewards/reward/mean", "reward", "value_loss", "kl"} <= set(line)
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["beta"] != lines[-1]["beta"]
    samples = [json.loads(line) for line in (whole / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "completion", "reward", "answer"} <= set(samples[0])
    manifest = json.loads((whole / "ppo" / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"base", "reference", "critic", "reward reward"}


def test_a_finished_run_is_skipped(whole: Path) -> None:
    said = complete([sys.executable, "-m", "pipeline", "run", str(whole.parent / "run.yaml")], whole.parent)
    assert "ppo: already done, skipped" in said


MOMENTS = {
    "generate": ("rollout-0", "readback", 4),
    "update": ("rollout-0", "generate", 3),
    "sync": ("policy-0", "weight_source.prepare", 1),
}
"""What a process has done, and how often in this life of the run, just before a phase begins."""


@pytest.mark.parametrize(
    "phases",
    [("update", "sync"), pytest.param(("generate", "update", "sync"), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_a_run_killed_in_these_phases_ends_with_the_same_adapter(
    phases: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    command, run = command_for(tmp_path), tmp_path / "run"
    for phase in phases:
        who, method, times = MOMENTS[phase]
        moment = has_done(run, who, method, calls(run, who, method) + times)
        process = start(command, tmp_path)
        when(process, moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (run / "ppo" / "manifest.json").exists(), phase
    said = complete(command, tmp_path)
    assert "ppo: continues from checkpoint-" in said
    assert adapter_digest(run) == adapter_digest(whole)
    assert repeatable(run) == repeatable(whole)


def test_two_engines_of_which_one_is_killed_make_the_same_adapter(whole: Path, tmp_path: Path) -> None:
    command, run = command_for(tmp_path, engines=2), tmp_path / "run"
    process = start(command, tmp_path)
    # When it connects, for version 0, and for version 1: then it generates, for a tenth of a second.
    when(process, lambda: calls(run, "rollout-1", "score_tokens") >= 3)
    time.sleep(0.02)
    os.kill(pid_of(run, "rollout-1"), signal.SIGKILL)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert "rollout-1 was replaced" in said
    lives = re.findall(r"--- rollout-1 pid", (run / "logs" / "rollout-1.log").read_text())
    assert len(lives) == 2
    assert adapter_digest(run) == adapter_digest(whole)
    assert repeatable(run) == repeatable(whole)


@pytest.mark.slow
def test_roles_on_hosts_of_their_own_make_the_same_adapter(whole: Path, tmp_path: Path) -> None:
    """Two ranks each, as the policy has them: then rows are dealt alike, and not a bit differs."""
    command, run = command_for(tmp_path), tmp_path / "run"
    apart = config(run)
    own = {"workers": 2, "cpus": 0.1}
    apart["roles"] |= {"critic": own, "reward": own, "reference": own}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(apart, sort_keys=False))
    complete(command, tmp_path)
    assert (run / "logs" / "critic-1.log").is_file()
    assert adapter_digest(run) == adapter_digest(whole)
    assert repeatable(run) == repeatable(whole)


@pytest.mark.slow
def test_a_dead_policy_rank_ends_the_run_with_its_name(tmp_path: Path) -> None:
    command, run = command_for(tmp_path), tmp_path / "run"
    process = start(command, tmp_path)
    when(process, lambda: calls(run, "rollout-0", "generate") == 3)
    os.kill(pid_of(run, "policy-1"), signal.SIGKILL)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1, said[-3000:]
    assert re.search(r"policy-1 failed in phase '(update|sync|logprobs)'", said), said[-3000:]
    assert "run the same command again" in said

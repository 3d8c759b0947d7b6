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

import psutil
import pytest

from actors.cluster.environment import CORE_APART
from tests.whole_runs.runs import (
    TINY_MOE,
    adapter_digest,
    calls,
    command_of,
    complete,
    has_done,
    kill_when,
    lines_of,
    pid_of,
    start,
    when,
)

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]

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
        "model": {"base": str(TINY_MOE), "lora": {"r": 4, "lora_alpha": 8}},
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
    command = command_of(directory, config(directory / "run", engines))
    (directory / "shaped.py").write_text(REWARD)
    return command


def repeatable(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not UNEQUAL.match(k)} for line in lines_of(run, "ppo")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end; its directory."""
    directory = tmp_path_factory.mktemp("whole")
    complete(command_for(directory), directory)
    return directory / "run"


def test_every_step_is_checked_and_logged(whole: Path) -> None:
    lines = lines_of(whole, "ppo")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["sync/version"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert line["mismatch/max"] < 1e-4
        assert line["sync/probe_max"] < 1e-4
        assert {"rewards/digits/mean", "rewards/reward/mean", "reward", "value_loss", "kl"} <= set(line)
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["beta"] != lines[-1]["beta"]
    samples = lines_of(whole, "ppo", "samples")
    assert {"step", "prompt", "completion", "reward", "answer"} <= set(samples[0])
    manifest = json.loads((whole / "ppo" / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"base", "reference", "critic", "reward reward"}


def test_a_finished_run_is_skipped(whole: Path) -> None:
    said = complete([sys.executable, "-m", "pipeline", "run", str(whole.parent / "run.yaml")], whole.parent)
    assert "ppo: already done, skipped" in said


MOMENTS = {
    "generate": ("rollout-0", "readback", 4),
    "update": ("rollout-0", "advance", 3),
    "sync": ("policy-0", "weight_source.prepare", 1),
}
"""What a process has done, and how often in this life of the run, just before a phase begins."""


@pytest.mark.slow
def test_a_run_killed_in_these_phases_ends_with_the_same_adapter(whole: Path, tmp_path: Path) -> None:
    """One that is killed in an update is among the losses of tests/chaos/test_chaos.py."""
    command, run = command_for(tmp_path), tmp_path / "run"
    for phase, (who, method, times) in MOMENTS.items():
        kill_when(command, tmp_path, has_done(run, who, method, calls(run, who, method) + times))
        assert not (run / "ppo" / "manifest.json").exists(), phase
    said = complete(command, tmp_path)
    assert "ppo: continues from checkpoint-" in said
    assert adapter_digest(run, "ppo") == adapter_digest(whole, "ppo")
    assert repeatable(run) == repeatable(whole)


WAITS = """
    import os, time
    while os.path.exists("{0}") and not os.path.exists("{0}/go"):
        time.sleep(0.05)
    if os.path.exists("{0}/go"):
        os.rmdir("{0}/go")
"""
"""Lines of a reward function that lets a step end when somebody says so."""


@pytest.mark.slow
def test_engines_that_come_and_go_while_a_run_goes_on_make_the_same_adapter(
    whole: Path, tmp_path: Path
) -> None:
    command, run, held = command_for(tmp_path), tmp_path / "run", tmp_path / "held"
    definition, rest = REWARD.split("\n    texts", 1)
    (tmp_path / "shaped.py").write_text(definition + WAITS.format(held) + "    texts" + rest)
    process = start(command, tmp_path)
    when(process, lambda: calls(run, "rollout-0", "score_tokens") >= 1)
    held.mkdir()

    def step() -> None:
        """Let the step that is held end, and the next one draw."""
        drawn = calls(run, "rollout-0", "advance")
        (held / "go").mkdir()
        when(process, lambda: calls(run, "rollout-0", "advance") > drawn)

    def scale(engines: int) -> subprocess.Popen[str]:
        """The command, once it has asked."""
        asking = start([*command[:3], "scale", str(run), f"rollout={engines}"], tmp_path)
        when(asking, (run / "SCALE").exists)
        return asking

    when(process, lambda: calls(run, "rollout-0", "advance") >= 1)
    more = scale(2)
    step()
    when(process, lambda: calls(run, "rollout-1", "score_tokens") >= 1)
    time.sleep(0.5)
    step()
    said, _ = more.communicate(timeout=60)
    assert more.returncode == 0, said
    assert "rollout-1 admitted" in said
    too_many = scale(99)
    step()
    said, _ = too_many.communicate(timeout=60)
    assert (too_many.returncode, "missing: 2" in said) == (2, True), said
    when(process, lambda: calls(run, "rollout-1", "advance") >= 1)
    fewer = scale(1)
    held.rename(tmp_path / "free")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert "rollout-1 ended; rollout has 1 of 2" in said
    assert fewer.wait(60) == 0
    assert adapter_digest(run, "ppo") == adapter_digest(whole, "ppo")
    assert repeatable(run) == repeatable(whole)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rollout-0", "policy-1"])
def test_a_process_that_is_stopped_is_noticed_in_half_a_minute(who: str, whole: Path, tmp_path: Path) -> None:
    """Defaults are 900 s and more. It is replaced, with the same adapter."""
    command, run = command_for(tmp_path), tmp_path / "run"
    process = start(command, tmp_path)
    when(process, lambda: calls(run, "rollout-0", "advance") >= 4)
    os.kill(pid_of(run, who), signal.SIGSTOP)
    began = time.monotonic()
    said, _ = process.communicate(timeout=400)
    assert 30 < time.monotonic() - began < 150
    assert process.returncode == 0, said[-3000:]
    assert f"{who} was lost: its process was stopped (SIGSTOP) for 30 s" in said
    assert adapter_digest(run, "ppo") == adapter_digest(whole, "ppo")
    assert repeatable(run) == repeatable(whole)


def test_an_engine_whose_core_is_apart_makes_the_same_adapter_also_when_the_core_is_killed(
    whole: Path, tmp_path: Path
) -> None:
    """As vLLM does by default on GPUs."""
    command, run = command_for(tmp_path), tmp_path / "run"
    process = start(command, tmp_path, **{CORE_APART: "1"})
    said = killed_in_version_one(process, run, lambda child: "EngineCore" in child.name())
    assert process.returncode == 0, said[-3000:]
    assert "rollout-0 was lost: " in said
    assert adapter_digest(run, "ppo") == adapter_digest(whole, "ppo")
    assert repeatable(run) == repeatable(whole)


def test_a_tensor_parallel_engine_is_synced_and_replaced_when_a_worker_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command_for(tmp_path)
    spread = config(run)
    spread["roles"]["rollout"]["engine"] = {"tensor_parallel_size": 2}
    process = start(command_of(tmp_path, spread), tmp_path)
    said = killed_in_version_one(process, run, lambda child: "Worker_TP1" in child.name())
    assert process.returncode == 0, said[-3000:]
    assert "rollout-0 was lost: " in said
    lines = lines_of(run, "ppo")
    assert [line["sync/version"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["mismatch/max"] < 1e-4 and line["sync/probe_max"] < 1e-4 for line in lines)


def on_one_device(directory: Path, **rollout: Any) -> list[str]:
    """The command of a run in whose turns everything of the policy moves."""
    command_for(directory)
    shared = config(directory / "run")
    shared["roles"]["rollout"] = {"share": "policy", "offload": "all", **rollout}
    return command_of(directory, shared)


def test_policy_and_engines_in_turns_on_one_device_make_the_same_adapter_also_when_engines_are_killed(
    whole: Path, tmp_path: Path
) -> None:
    """One while it generates, one while it sleeps and the policy is awake."""
    process, run = start(on_one_device(tmp_path), tmp_path), tmp_path / "run"
    when(process, lambda: calls(run, "rollout-1", "wake_up") >= 3)
    os.kill(pid_of(run, "rollout-1"), signal.SIGKILL)
    when(process, lambda: calls(run, "rollout-0", "sleep") >= 6)
    os.kill(pid_of(run, "rollout-0"), signal.SIGKILL)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert "policy and rollout take turns" in said
    assert len(re.findall(r"rollout-[01] was lost: ", said)) == 2
    assert adapter_digest(run, "ppo") == adapter_digest(whole, "ppo")
    assert repeatable(run) == repeatable(whole)


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["core apart", "two workers", "as the plan says"])
def test_engines_of_several_processes_take_turns_with_the_policy_too(
    spread: str, whole: Path, tmp_path: Path
) -> None:
    """Two workers compute other last digits, which enter no loss here."""
    options: dict[str, Any] = {"workers": 1}
    if spread == "two workers":
        options["engine"] = {"tensor_parallel_size": 2}
    if spread == "as the plan says":
        options["offload"] = "auto"
    process = start(
        on_one_device(tmp_path, **options), tmp_path, **{CORE_APART: "01"[spread == "core apart"]}
    )
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert adapter_digest(tmp_path / "run", "ppo") == adapter_digest(whole, "ppo")


def killed_in_version_one(
    process: subprocess.Popen[str], run: Path, which: Callable[[psutil.Process], bool]
) -> str:
    """Kill one of the processes of a run's engine once version 1 is served; all that the run said."""
    when(process, lambda: calls(run, "rollout-0", "score_tokens") >= 3)
    children = psutil.Process(pid_of(run, "rollout-0")).children(recursive=True)
    (chosen,) = [child for child in children if which(child)]
    chosen.kill()
    said, _ = process.communicate(timeout=400)
    return said


@pytest.mark.slow
def test_roles_on_hosts_of_their_own_make_the_same_adapter(whole: Path, tmp_path: Path) -> None:
    """Two ranks each, as the policy has them: then rows are dealt alike, and not a bit differs."""
    run = tmp_path / "run"
    command_for(tmp_path)
    apart = config(run)
    own = {"workers": 2, "cpus": 0.1}
    apart["roles"] |= {"critic": own, "reward": own, "reference": own}
    complete(command_of(tmp_path, apart), tmp_path)
    assert (run / "logs" / "critic-1.log").is_file()
    assert adapter_digest(run, "ppo") == adapter_digest(whole, "ppo")
    assert repeatable(run) == repeatable(whole)


@pytest.mark.slow
def test_policy_ranks_killed_in_an_update_and_in_a_sync_are_replaced_and_the_adapter_is_the_same(
    whole: Path, tmp_path: Path
) -> None:
    command, run = command_for(tmp_path), tmp_path / "run"
    process = start(command, tmp_path)
    when(process, lambda: calls(run, "policy-0", "updates.update") >= 8)
    os.kill(pid_of(run, "policy-1"), signal.SIGKILL)
    when(process, lambda: calls(run, "rollout-0", "weights.stage") >= 4)
    os.kill(pid_of(run, "policy-0"), signal.SIGKILL)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert "policy-1 was replaced" in said
    assert "policy-0 was replaced" in said
    assert re.search(r"replaced: policy 2 \([\d.]+ s in all\)", said)
    noted = [json.loads(line) for line in (run / "replacements.jsonl").read_text().splitlines()]
    assert [(one["stage"], one["role"], one["rank"]) for one in noted] == [
        ("ppo", "policy", 1),
        ("ppo", "policy", 0),
    ]
    assert 1 <= noted[0]["step"] <= noted[1]["step"] <= 5
    assert "Replaced processes" in (run / "report.html").read_text()
    assert adapter_digest(run, "ppo") == adapter_digest(whole, "ppo")
    assert repeatable(run) == repeatable(whole)


@pytest.mark.slow
def test_a_dead_policy_rank_ends_the_run_with_its_name_where_nothing_may_be_replaced(tmp_path: Path) -> None:
    command_for(tmp_path)
    run = tmp_path / "run"
    command = command_of(tmp_path, config(run) | {"limits": {"max_restarts": 0}})
    process = start(command, tmp_path)
    when(process, lambda: calls(run, "rollout-0", "advance") == 3)
    os.kill(pid_of(run, "policy-1"), signal.SIGKILL)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1, said[-3000:]
    assert re.search(r"policy-1 failed in phase '(update|sync|logprobs)'", said), said[-3000:]
    assert "run the same command again" in said

"""GRPO on samples of older weights, on real Ray and vLLM: repeatable where syncs wait for samples in flight,
unharmed where they don't."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

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
from tests.whole_runs.test_online import UNEQUAL

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 7


def command_for(directory: Path, engines: int = 1, **stage: Any) -> list[str]:
    """A run of a few steps whose checkpoints and logged lines fall on different steps."""
    grpo = {
        "data": {"source": "builtin:arithmetic", "split": "prompts", "max_rows": 64},
        "rewards": "exact_match", "batch_size": 32, "num_generations": 4, "max_completion_length": 12,
        "max_length": 64, "max_steps": STEPS, "save_steps": 2, "learning_rate": 1e-3, "staleness": 2,
    }  # fmt: skip
    run = {
        "name": "stale", "output_dir": str(directory / "run"), "seed": 5,
        "model": {
            "base": str(TINY_MOE), "lora": {"r": 4, "lora_alpha": 8, "targets": ["attention", "experts"]},
        },
        "stages": {"grpo": grpo | stage},
        "roles": {"rollout": {"workers": engines}},
        "logging": {"logging_steps": 3},
    }  # fmt: skip
    return command_of(directory, run)


def with_reward_model(directory: Path, **stage: Any) -> list[str]:
    """The same after a reward stage: the samples of later steps are scored by a model on the policy's base,
    in a thread of its own, while the policy trains."""
    command_for(directory, **stage)
    run = yaml.safe_load((directory / "run.yaml").read_text())
    pairs = {"source": "builtin:arithmetic", "split": "preference", "max_rows": 64}
    reward = {"data": pairs, "batch_size": 8, "max_steps": 2, "max_length": 64}
    run["stages"] = {"reward": reward} | run["stages"]
    run["stages"]["grpo"]["rewards"] = ["exact_match", {"source": "reward", "weight": 0.5}]
    run["roles"]["policy"] = {"workers": 2}
    return command_of(directory, run)


def lines(run: Path) -> list[dict[str, float]]:
    return lines_of(run, "grpo")


def made_by(run: Path) -> tuple[str, list[dict[str, float]]]:
    """The adapter, and every metric that a repeated run has to have again."""
    # What engines say of their own samples differs in the last digits, and with it what is made of that.
    told = re.compile(UNEQUAL.pattern + r"|^sampling/sampling_logp_difference")
    kept = [{k: v for k, v in line.items() if not told.match(k)} for line in lines(run)]
    rounded = [
        {k: round(v, 4) if k.startswith(("sampling/", "loss")) else v for k, v in line.items()}
        for line in kept
    ]
    return adapter_digest(run, "grpo"), rounded


@pytest.mark.parametrize("correction", [None, False])
def test_a_run_killed_while_later_samples_are_drawn_ends_with_the_same_adapter(
    correction: bool | None, tmp_path: Path
) -> None:
    """Ratios are to what the engine said: its log-probabilities have to be the same too, and they are, of the
    same samples in the same batches."""
    stage = {"vllm_importance_sampling_correction": correction}
    complete(command_for(tmp_path / "whole", **stage), tmp_path / "whole")
    command, run = command_for(tmp_path / "killed", **stage), tmp_path / "killed" / "run"
    kill_and_go_on(command, tmp_path / "killed", has_done(run, "policy-0", "weight_source.prepare", 6))
    assert made_by(run) == made_by(tmp_path / "whole" / "run")
    ages = [line["staleness/max"] for line in lines(run)]
    assert [line["step"] for line in lines(run)] == [3, 6, 7]
    assert ages == [1.0, 2.0, 2.0]  # Means over windows: 0, 1, 2 in the first.


def kill_and_go_on(command: list[str], directory: Path, reached: Callable[[], bool]) -> None:
    """Kill a run and all that it started at a moment, then let the same command end it."""
    kill_when(command, directory, reached)
    assert not (directory / "run" / "grpo" / "manifest.json").exists()
    assert "grpo: continues from checkpoint-" in complete(command, directory)


def test_what_dynamic_sampling_drew_ahead_is_the_same_after_a_kill(tmp_path: Path) -> None:
    stage = {"max_resampling_rounds": 2, "num_generations": 2}
    complete(with_reward_model(tmp_path / "whole", **stage), tmp_path / "whole")
    command, run = with_reward_model(tmp_path / "killed", **stage), tmp_path / "killed" / "run"
    kill_and_go_on(command, tmp_path / "killed", has_done(run, "policy-0", "weight_source.prepare", 6))
    assert made_by(run) == made_by(tmp_path / "whole" / "run")
    assert max(line["dynamic_sampling/rounds"] for line in lines(run)) > 0
    assert {"rewards/reward/mean", "reward", "frac_reward_zero_std"} <= set(lines(run)[-1])
    assert [line["staleness/max"] for line in lines(run)] == [1.0, 2.0, 2.0]


def test_online_dpo_learns_from_older_pairs_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    stage = {"type": "online_dpo", "staleness": 1}
    complete(command_for(tmp_path / "whole", **stage), tmp_path / "whole")
    command, run = command_for(tmp_path / "killed", **stage), tmp_path / "killed" / "run"
    kill_and_go_on(command, tmp_path / "killed", has_done(run, "policy-0", "weight_source.prepare", 6))
    assert made_by(run) == made_by(tmp_path / "whole" / "run")
    assert [line["staleness/max"] for line in lines(run)] == pytest.approx([2 / 3, 1, 1], abs=1e-3)
    assert all(line["frac_pairs"] > 0 for line in lines(run))


def test_an_engine_lost_at_staleness_1_draws_its_samples_again(tmp_path: Path) -> None:
    """The correction reads what engines said of their samples, which differs in last digits where others drew
    them: so every metric has to come back, and the adapter up to these."""
    from safetensors.numpy import load_file

    stage = {"staleness": 1}
    complete(command_for(tmp_path / "whole", engines=2, **stage), tmp_path / "whole")
    command, run = command_for(tmp_path / "lost", engines=2, **stage), tmp_path / "lost" / "run"
    process = start(command, tmp_path / "lost")
    when(process, lambda: calls(run, "rollout-1", "weights.commit") >= 2)
    os.kill(pid_of(run, "rollout-1"), signal.SIGKILL)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert "rollout-1 was lost: " in said
    name = Path("grpo") / "adapter" / "adapter_model.safetensors"
    kept, again = load_file(tmp_path / "whole" / "run" / name), load_file(run / name)
    assert max(float(abs(kept[key] - again[key]).max()) for key in kept) < 1e-4
    rewards = [[line["reward"] for line in lines(one)] for one in (run, tmp_path / "whole" / "run")]
    assert rewards[0] == rewards[1]


def test_a_run_killed_while_samples_in_flight_are_kept_goes_on(tmp_path: Path) -> None:
    stage = {"sync": {"in_flight": "keep"}, "staleness": 1, "max_completion_length": 48, "max_length": 96}
    command, run = command_for(tmp_path, **stage), tmp_path / "run"
    kill_and_go_on(command, tmp_path, lambda: calls(run, "rollout-0", "weights.commit") >= 5)
    assert [line["step"] for line in lines(run)] == [3, 6, 7]
    assert all(0 <= line["staleness/max"] <= 1 for line in lines(run))


def test_samples_in_flight_outlive_a_sync_and_a_lost_engine(tmp_path: Path) -> None:
    stage = {"sync": {"in_flight": "keep"}, "staleness": 1, "max_completion_length": 48, "max_length": 96}
    command, run = command_for(tmp_path, engines=2, **stage), tmp_path / "run"
    process = start(command, tmp_path)
    when(
        process,
        lambda: calls(run, "rollout-1", "weights.commit") >= 3 and calls(run, "rollout-1", "advance") >= 4,
    )
    os.kill(pid_of(run, "rollout-1"), signal.SIGKILL)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert "rollout-1 was lost: " in said
    assert all(0 <= line["staleness/max"] <= 1 for line in lines(run))
    assert lines(run)[-1]["step"] == STEPS

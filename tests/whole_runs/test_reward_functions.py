"""A run whose reward function lets nothing else in Python work: its deadline holds, and so does a signal."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.whole_runs.runs import TINY_MOE, command_of, lines_of, start, when

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]

REWARDS = '''
import os, re, signal, subprocess
from pathlib import Path

def well_formed(completions, **columns):
    """Backtracks for ever in every step, and leaves a process."""
    with Path("pids").open("a") as file:
        print(os.getpid(), subprocess.Popen(["sleep", "600"]).pid, file=file)
    re.match(r"^(a+)+$", "a" * 60 + "b")

def verified(completions, answer, **columns):
    """As math-verify does it: with an alarm, and 0 where that fails."""
    found = []
    for completion in completions:
        try:
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.alarm(5)
            found.append(1.0)
        except Exception:
            found.append(0.0)
        finally:
            signal.alarm(0)
    return found
'''


def config(output: Path) -> dict[str, Any]:
    return {
        "name": "rewarded",
        "output_dir": str(output),
        "model": {"base": str(TINY_MOE), "lora": {"r": 4, "lora_alpha": 8}},
        "stages": {
            "grpo": {
                "data": {"source": "builtin:arithmetic", "split": "prompts", "max_rows": 64},
                "rewards": [
                    "rewards_of_run:verified",
                    {"source": "rewards_of_run:well_formed", "timeout_s": 8, "on_error": 0},
                ],
                "batch_size": 8,
                "num_generations": 4,
                "max_steps": 50,
                "max_length": 64,
                "max_completion_length": 8,
            }
        },
    }


@pytest.mark.slow
def test_a_run_stops_and_saves_though_its_reward_function_never_lets_go_of_the_interpreter(
    tmp_path: Path,
) -> None:
    (tmp_path / "rewards_of_run.py").write_text(REWARDS)
    output, pids = tmp_path / "run", tmp_path / "pids"
    process = start(command_of(tmp_path, config(output)), tmp_path)
    try:
        when(process, lambda: pids.is_file() and len(pids.read_text().split()) >= 2)
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, said[-3000:]
    assert time.monotonic() - begun < 100
    assert "no answer within 8 s for 8 samples" in said
    assert "stopped after saving: grpo at step 1 of 50" in said
    assert [line["rewards/verified/mean"] for line in lines_of(output, "grpo")] == [1.0]
    assert not [pid for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid)]

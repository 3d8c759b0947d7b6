"""Whole runs as a user starts them: a process of their own, the moments of their lives, what they leave."""

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
import yaml

from pipeline.artifacts.manifest import file_digest

ROOT = Path(__file__).parents[2]
TINY_MOE = ROOT / "assets" / "tiny-moe"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
"""Runs start in directories of their own, where their reward functions are; the project need not be
installed."""


def command_of(directory: Path, config: dict[str, Any]) -> list[str]:
    """The command that runs `config`, which is written to `directory/run.yaml`."""
    directory.mkdir(exist_ok=True)
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return [sys.executable, "-m", "pipeline", "run", str(path)]


def raylign(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command to its end, whatever that is."""
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=400)


def complete(command: list[str], directory: Path) -> str:
    """What a run says that has to end well."""
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=directory, env=ENVIRONMENT, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def start(command: list[str], directory: Path, **variables: str) -> subprocess.Popen[str]:
    """A run under way, in a process group of its own, with further variables of the environment."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=directory,
        env=ENVIRONMENT | variables,
        start_new_session=True,
    )


def when(process: subprocess.Popen[str], reached: Callable[[], bool], limit: float = 300) -> None:
    """Wait for a moment in the life of a run."""
    deadline = time.monotonic() + limit
    while not reached():
        assert process.poll() is None, f"the run ended with {process.returncode} before the moment"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_when(command: list[str], directory: Path, reached: Callable[[], bool]) -> None:
    """Start a run, and kill -9 it with all that it started as soon as `reached` says so."""
    process = start(command, directory)
    when(process, reached)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_an_engine_as_it_generates(process: subprocess.Popen[str], run: Path) -> None:
    """Kill the second of two engines while it generates with version 1; the run goes on with another one in
    its place, to its end."""
    # It scores when it connects, for version 0, and for version 1: then it generates, for .1 s.
    when(process, lambda: calls(run, "rollout-1", "score_tokens") >= 3)
    time.sleep(0.02)
    os.kill(pid_of(run, "rollout-1"), signal.SIGKILL)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-3000:]
    assert "rollout-1 was lost: " in said
    lives = re.findall(r"--- rollout-1 pid", (run / "logs" / "rollout-1.log").read_text())
    assert len(lives) == 2


def calls(run: Path, who: str, method: str) -> int:
    """How many calls of a method a process has finished, by its trace; all its lives together."""
    path = run / "logs" / "trace" / f"{who}.jsonl"
    return path.read_text().count(f'"method": "{method}"') if path.is_file() else 0


def has_done(run: Path, who: str, method: str, times: int) -> Callable[[], bool]:
    """The moment at which a process has finished so many calls of a method."""
    return lambda: calls(run, who, method) == times


def pid_of(run: Path, who: str) -> int:
    """Process id of the latest life of a process, by its log."""
    return int(re.findall(rf"--- {who} pid (\d+)", (run / "logs" / f"{who}.log").read_text())[-1])


def lines_of(run: Path, stage: str, name: str = "metrics") -> list[dict[str, Any]]:
    """Lines of a stage's metrics, or of another of its logs."""
    return [json.loads(line) for line in (run / stage / f"{name}.jsonl").read_text().splitlines()]


def adapter_digest(run: Path, stage: str) -> str:
    """Of the adapter that a stage made."""
    return file_digest(run / stage / "adapter" / "adapter_model.safetensors")


def processes_with(variable: str) -> list[psutil.Process]:
    """Processes that live and have inherited a variable, by which those of one run can be told from all."""

    def has_it(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and variable in process.environ()
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if has_it(process)]

"""With `ray.fast_start: false` a run starts in Ray's own way, and comes to the same."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from tests.whole_runs.runs import TINY_MOE, adapter_digest, command_of, complete, pid_of, start

pytestmark = pytest.mark.ray

RAYS_OWN = ("log_monitor.py", "dashboard/agent.py", "runtime_env/agent/main.py")
FAST = ("fork_server.py", "idle_agent.py")
"""Scripts that run as long as a run does, one way and the other."""


def config(run: Path, fast: bool) -> dict[str, Any]:
    data = {"source": "builtin:arithmetic", "split": "train", "max_rows": 8}
    return {
        "name": "start",
        "output_dir": str(run),
        "model": {"base": str(TINY_MOE), "lora": {"r": 4}},
        "ray": {"fast_start": fast},
        "stages": {"sft": {"type": "sft", "data": data, "batch_size": 2, "max_steps": 2}},
    }


def below(pid: int) -> list[str]:
    """Command lines of a process's descendants."""
    found, pids = [], [pid]
    while pids:
        process = Path(f"/proc/{pids.pop()}")
        with contextlib.suppress(OSError):  # It has ended since.
            found.append((process / "cmdline").read_text().replace("\0", " "))
            for thread in (process / "task").iterdir():
                pids += map(int, (thread / "children").read_text().split())
    return found


def lines_and_processes(directory: Path, run: Path, fast: bool) -> tuple[str, list[str]]:
    """What a run says, and the command lines of the processes below it when its rank was up."""
    process = start(command_of(directory, config(run, fast)), directory)
    seen: list[str] = []
    log = run / "logs" / "policy-0.log"
    while process.poll() is None:
        if not seen and log.is_file() and "--- policy-0" in log.read_text():
            assert pid_of(run, "policy-0")
            seen = below(process.pid)
        time.sleep(0.01)
    said = process.communicate()[0]
    assert process.returncode == 0, said[-3000:]
    return said, seen


def those(scripts: tuple[str, ...], processes: list[str]) -> list[str]:
    """Of these scripts, the ones that run."""
    return [script for script in scripts if any(script in line for line in processes)]


@pytest.mark.slow
def test_a_run_without_the_fast_start_is_started_by_ray_itself_and_learns_the_same(tmp_path: Path) -> None:
    fast_said, fast = lines_and_processes(tmp_path, tmp_path / "fast", True)
    plain_said, plain = lines_and_processes(tmp_path, tmp_path / "plain", False)
    assert "ray: fast start; workers are forked from process" in fast_said
    assert "ray: plain start (ray.fast_start: false)\n" in plain_said
    assert (those(FAST, fast), those(RAYS_OWN, fast)) == ([*FAST], [])
    assert (those(FAST, plain), those(RAYS_OWN, plain)) == ([], [*RAYS_OWN])
    assert not (tmp_path / "plain" / "logs" / "fork-server.log").exists()
    assert adapter_digest(tmp_path / "plain", "sft") == adapter_digest(tmp_path / "fast", "sft")
    again = complete(command_of(tmp_path, config(tmp_path / "plain", True)), tmp_path)
    assert "sft: already done, skipped" in again

"""examples/slurm.sh with two made-up nodes: allocation, SIGTERM, queued again, finished.

Slurm's commands are stand-ins that run here what Slurm runs on its nodes. Ray, the run, its saving and its
going on are real.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.whole_runs.runs import TINY_MOE, command_of, lines_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

COMMANDS = {
    # Hands its command on to the environment's Python; `raylign` as installed.
    "raylign": 'exec "$PYTHON" -P -m raylign "$@"',
    "scontrol": """
case "$1" in
show) echo made-up-1; [ "$3" = "made-up-1" ] || echo made-up-2 ;;
requeue) echo "$2" >> "$QUEUE" ;;
esac
""",
    # A task for each node that is asked for, all on this machine; ended with a signal as Slurm does it.
    "srun": """
while [ "${1#--}" != "$1" ]; do
  case "$1" in --nodes=*) nodes=${1#--nodes=} ;; --nodelist=*) list=${1#--nodelist=} ;; esac
  shift
done
echo "$nodes ${list:-all} $1 ${2:-}" >> "$STEPS"
if [ "$nodes" = 1 ]; then exec "$@"; fi
for i in $(seq "$nodes"); do "$@" & done
wait
""",
}
JOB = str(os.getpid())
"""Number of the job, of which its ports are made: other tests may run on this machine."""
SLURM = {
    "SLURM_JOB_ID": JOB,
    "SLURM_JOB_NODELIST": "made-up-[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "1",
}


@pytest.fixture
def cluster(tmp_path: Path, repository: Path) -> Iterator[dict[str, str]]:
    """Environment of a batch script; files of Ray's have a short path of their own."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)
    files = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    path = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    unset = ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    yield {name: value for name, value in os.environ.items() if name not in unset} | {
        **SLURM,
        "PATH": os.pathsep.join(path),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(repository),
        "RAYLIGN_RAY_FILES": str(files / "ray"),
        "QUEUE": str(tmp_path / "queue"),
        "STEPS": str(tmp_path / "steps"),
    }
    shutil.rmtree(files, ignore_errors=True)


def config(output: Path) -> dict[str, Any]:
    """Two ranks, each of which needs a node of its own."""
    sft = {
        "data": {"source": "builtin:arithmetic", "max_rows": 64},
        "batch_size": 8,
        "max_steps": 4000,
        "max_length": 64,
        "save_steps": 2000,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
    }
    return {
        "name": "batch",
        "output_dir": str(output),
        "model": {"base": str(TINY_MOE), "lora": {"r": 2}},
        "stages": {"sft": sft},
        "roles": {"policy": {"workers": 2, "cpus": 1, "placement": "strict_spread"}},
    }


def sbatch(script: Path, arguments: list[str], directory: Path, cluster: dict[str, str]) -> Any:
    """The batch script as Slurm starts it on the first node."""
    return subprocess.Popen(
        ["bash", str(script), *arguments],
        cwd=directory,
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_job_saves_at_sigterm_is_queued_again_and_goes_on_to_its_end(
    repository: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    run, script = tmp_path / "runs" / "batch", repository / "examples" / "slurm.sh"
    _, *_, file = command_of(tmp_path, config(run))
    job = sbatch(script, [file], tmp_path, cluster)
    metrics = run / "sft" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(job.pid).children(recursive=True)
    commands = [" ".join(process.cmdline()) for process in family]
    assert sum("/raylet/raylet" in command for command in commands) == 2
    job.send_signal(signal.SIGTERM)  # as --signal=B:TERM: the batch script alone
    said, _ = job.communicate(timeout=120)
    assert "raylign run ended with exit code 75" in said, said
    assert (tmp_path / "queue").read_text() == f"{JOB}\n"
    saved = [int(path.name.rpartition("-")[2]) for path in (run / "sft").glob("checkpoint-*")]
    assert len(saved) == 1
    assert 3 < saved[0] < 4000
    psutil.wait_procs(family, timeout=10)
    assert [process for process in family if process.is_running()] == []
    assert not Path(cluster["RAYLIGN_RAY_FILES"]).exists()

    again = sbatch(
        script,
        [file, f"stages.sft.max_steps={saved[0] + 3}"],
        tmp_path,
        cluster | {"SLURM_RESTART_COUNT": "1"},
    )
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert f"sft: continues from checkpoint-{saved[0]}" in said
    assert (run / "sft" / "adapter").is_dir()
    assert lines_of(run, "sft")[-1]["step"] == saved[0] + 3
    assert (tmp_path / "queue").read_text() == f"{JOB}\n"
    heads = re.findall(r"^1 made-up-1 ray start$", (tmp_path / "steps").read_text(), re.MULTILINE)
    others = re.findall(r"^1 made-up-2 ray start$", (tmp_path / "steps").read_text(), re.MULTILINE)
    assert (len(heads), len(others)) == (2, 2)
    # The token is in no command line.
    assert not re.search(r"\b[0-9a-f]{64}\b", "\n".join(commands) + said)


def test_a_signal_before_the_run_has_begun_queues_the_job_again(
    repository: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    one_node = cluster | {"SLURM_JOB_NODELIST": "made-up-1", "SLURM_JOB_NUM_NODES": "1"}
    job = sbatch(repository / "examples" / "slurm.sh", ["missing.yaml"], tmp_path, one_node)
    steps = tmp_path / "steps"
    deadline = time.monotonic() + 60
    while not (steps.is_file() and "ray start" in steps.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=200)
    assert "missing.yaml" not in said
    assert (tmp_path / "queue").read_text() == f"{JOB}\n"
    assert not Path(cluster["RAYLIGN_RAY_FILES"]).exists()


def test_a_run_that_fails_ends_the_job_with_its_code_and_is_not_queued_again(
    repository: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    one_node = cluster | {"SLURM_JOB_NODELIST": "made-up-1", "SLURM_JOB_NUM_NODES": "1"}
    job = sbatch(repository / "examples" / "slurm.sh", ["missing.yaml"], tmp_path, one_node)
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 2, said
    assert "missing.yaml" in said
    assert not (tmp_path / "queue").exists()
    assert not Path(cluster["RAYLIGN_RAY_FILES"]).exists()


def test_without_a_config_the_job_says_how_it_is_called(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(repository / "examples" / "slurm.sh")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr

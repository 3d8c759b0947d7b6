"""The one line that says why a job failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import EXIT_STOPPED, RunFailure
from pipeline.jobs.commands import exit_code, failures, reason

HEAD = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n"


def job(message: str, code: int | None, status: str = "FAILED") -> Any:
    return SimpleNamespace(message=message, driver_exit_code=code, status=status, submission_id="a-1")


@pytest.mark.parametrize(
    ("message", "code", "says"),
    [
        (HEAD.format(2) + "reading\nerror: model.base: directory 'x'\n", 2, "model.base: directory 'x'"),
        (HEAD.format(1) + "failed: policy-0 failed: killed\n  next: again\n", 1, "policy-0 failed: killed"),
        (HEAD.format(2) + "a.yaml: 2 problems\n  - seed: 'x'\n", 2, "a.yaml: 2 problems - seed: 'x'"),
        (HEAD.format(1) + "Traceback (most recent call last):\n  File x\nKeyError: 1\n", 1, "KeyError: 1"),
        (HEAD.format(127) + "sh: 1: exec: python: not found\n", 127, "sh: 1: exec: python: not found"),
        (HEAD.format(-9) + "step 1\n", -9, "ended by signal 9 (kill -9, or no memory left"),
        (HEAD.format(-15), -15, "ended by signal 15"),
        (
            "Runtime Env setup failed: disk full\nTraceback (most recent call last):\nOSError: no space",
            None,
            "OSError: no space",
        ),
        ("Job supervisor actor could not be scheduled: 1 GPU\nmore", None, "Job supervisor actor could not"),
        ("", None, "FAILED"),
    ],
)
def test_the_reason_is_one_line(message: str, code: int | None, says: str) -> None:
    told = reason(job(message, code))
    assert told.startswith(says)
    assert "\n" not in told
    assert failures([job(message, code)]) == [f"a-1: {told}"]


def test_jobs_that_saved_or_were_ended_have_not_failed() -> None:
    assert failures([job("", EXIT_STOPPED), job("", None, "STOPPED"), job("", 0, "SUCCEEDED")]) == []


def test_a_job_without_a_code_of_its_own_is_a_failure_with_its_reason() -> None:
    assert exit_code(job("", 3)) == 3
    with pytest.raises(
        RunFailure, match=r"a-1 failed in phase 'run': ended by signal 9 .*\n.*raylign logs a-1"
    ):
        exit_code(job(HEAD.format(-9), -9))


def test_a_node_that_lacks_a_package_says_so_in_a_line(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['typer'] = None\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pipeline", "run", "x.yaml"],
        env={"PYTHONPATH": f"{repository}:{tmp_path}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "typer" in done.stderr
    assert "every node of a cluster needs the same" in done.stderr

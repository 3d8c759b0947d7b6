"""Tests of a completion's Python code, run in processes with limits of time, memory, processes and network.

No security boundary: the code reads and writes what the run's user may. It keeps faulty code from stopping a
run, and makes the easy ways of passing without being right (exiting early) no way.

Loads nothing but Python's own modules, since it runs in a process of reward functions (`child.py`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FENCE = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
RUNNER = Path(__file__).with_name("code_runner.py")
START_S = 5.0
"""Seconds for the start of an interpreter, beside those of the code."""
SHOWN_BYTES = 1 << 20
"""Of what a runner says that are read."""

_told: set[str] = set()


def code_rewards(
    completions: Sequence[Any],
    tests: Sequence[Any],
    *,
    score: str,
    seconds: float,
    memory_mb: int,
    processes: int,
) -> list[float | None]:
    """A reward function: scores of the code in completions; None for rows without tests."""

    def one(completion: Any, wanted: Any) -> float | None:
        if wanted is None:
            return None
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        passed = run_tests(code_of(text), tests_of(wanted), seconds, memory_mb, processes)
        return score_of(passed, score)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, completions, tests))


def code_of(text: str) -> str:
    """The code of an answer: its last fenced block, or all of it where it has none."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else text


def tests_of(value: Any) -> list[str]:
    """The tests of a row: texts of Python, each of which passes if it raises nothing.

    Raises:
        TypeError: they are neither a text nor a list of texts.
    """
    tests = [value] if isinstance(value, str) else value
    if not isinstance(tests, list | tuple) or not tests or not all(isinstance(test, str) for test in tests):
        raise TypeError(f"tests are a text or a list of texts, not {value!r}")
    return list(tests)


def score_of(passed: Sequence[bool], score: str) -> float:
    """`share`: of tests that passed; `all`: 1 if every one did."""
    return float(all(passed)) if score == "all" else sum(passed) / max(1, len(passed))


def run_tests(code: str, tests: Sequence[str], seconds: float, memory_mb: int, processes: int) -> list[bool]:
    """Run the code and then each test in its names, in a process of its own; what was not reached in time has
    not passed."""
    from pipeline.rewards.child import end_group

    nonce = secrets.token_hex(8)  # by which the code's own words are told from the runner's
    task = {"code": code, "tests": list(tests), "seconds": seconds, "memory_mb": memory_mb}
    task |= {"processes": processes, "nonce": nonce}
    with tempfile.TemporaryDirectory(prefix="code-") as folder, tempfile.TemporaryFile() as said:
        runner = subprocess.Popen(
            [sys.executable, "-I", str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            runner.communicate(json.dumps(task).encode(), timeout=START_S + seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_group(runner.pid)
            runner.wait()
        said.seek(0)
        words = [line.split() for line in said.read(SHOWN_BYTES).decode("utf-8", "replace").splitlines()]
    passed = {int(word[2]) for word in words if word[:2] == [nonce, "passed"] and len(word) == 3}
    for word in words:
        if word[:2] == [nonce, "unlimited"]:
            _tell(" ".join(word[2:]))
    return [index in passed for index in range(len(tests))]


def _tell(what: str) -> None:
    """Say once what this machine's kernel doesn't let the runner limit."""
    if what not in _told:
        _told.add(what)
        print(f"rewards: code: on this machine {what}", file=sys.stderr)

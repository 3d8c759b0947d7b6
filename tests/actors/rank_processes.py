"""Ranks of one host as processes of their own, without Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def free_address() -> str:
    """Where ranks can meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{s.getsockname()[1]}"


def as_forks(number: int, work: Callable[[int], None]) -> None:
    """Run `work(rank)` in that many forks of this process, which share its imports; exit as they do."""
    ranks = []
    for rank in range(number):
        pid = os.fork()
        if pid == 0:
            failed = 1
            try:
                work(rank)
                failed = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(failed)
        ranks.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in ranks))


def forked_ranks(script: str, out: Path, number: int, *arguments: str, timeout_s: float = 150) -> list[Any]:
    """Run `script NUMBER ARGUMENTS...`, which ends with `as_forks`; `out/rank-N.json` of each rank."""
    process = subprocess.Popen(
        [sys.executable, script, str(number), *arguments],
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=timeout_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-6000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(number)]


def _environment() -> dict[str, str]:
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


@contextmanager
def two_ranks(script: str, out: Path, *arguments: str, timeout_s: float = 150) -> Iterator[list[Any]]:
    """Run `script RANK ARGUMENTS...` as two ranks beside the body; the list has `out/rank-N.json` of both
    after it."""
    found: list[Any] = []
    env = _environment()
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), *arguments], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        yield found
        for process in ranks:
            _, errors = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    found += [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]

"""Ranks of one host as processes of their own, without Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def free_address() -> str:
    """Where ranks can meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{s.getsockname()[1]}"


@contextmanager
def two_ranks(
    script: str, out: Path, *arguments: str, timeout_s: float = 150, number: int = 2
) -> Iterator[list[Any]]:
    """Run `script RANK ARGUMENTS...` as two ranks, or another number, beside the body; the list has
    `out/rank-N.json` of each after it."""
    found: list[Any] = []
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), *arguments], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(number)
    ]
    try:
        yield found
        for process in ranks:
            _, errors = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    found += [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(number)]

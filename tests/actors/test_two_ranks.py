"""Two gloo ranks do the same steps as one: losses, gradients, metrics, log-probabilities (1e-5)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.actors import rank_worker


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_ranks_equal_one(tiny_base: Path, tmp_path: Path, repository: Path) -> None:
    init = f"tcp://127.0.0.1:{free_port()}"
    paths = [str(repository), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    command = [sys.executable, rank_worker.__file__, str(tiny_base)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", init, str(tmp_path)], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    one = rank_worker.scenarios(str(tiny_base), tmp_path / "one")
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors[-2000:]
    finally:
        for worker in workers:
            worker.kill()
    two = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert two[0] == two[1], "every rank reports the global figures and holds the same weights"
    for name, values in one.items():
        if name != "digest":
            assert two[0][name] == pytest.approx(values, rel=1e-5, abs=2e-6), name
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

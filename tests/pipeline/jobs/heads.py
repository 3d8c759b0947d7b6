"""The head of a cluster of its own, and `raylign` as a user of it types it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[3]
RAYS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Ray's variables, which a test sets itself or not at all."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A machine's user: `directory` has the working directory `project` and the files of the head."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.directory, self.project = directory, directory / "project"
        self.project.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in RAYS},
            "XDG_STATE_HOME": str(directory / "state"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            **environment,
        }
        self.port, self.gcs_port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """`ray start --head`, with ports of its own; returns when it takes jobs."""
        others = ("ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", f"--port={self.gcs_port}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}", f"--temp-dir={self.directory}/ray",
            *(f"--{name}={free_port()}" for name in (*others, "runtime-env-agent-port")),
        ]  # fmt: skip
        environment = {name: value for name, value in self.environment.items() if name != "PYTHONPATH"}
        with (self.directory / "head.log").open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 90
        while self.raylign("status", "--address", self.address).returncode != 0:
            assert self.process.poll() is None, (self.directory / "head.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the cluster did not start"
            time.sleep(1)

    def raylign(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command in the working directory, with further variables."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "raylign", *arguments],
            env={**self.environment, **environment},
            cwd=self.project,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def wait_for(self, run: str, text: str, seconds: float = 120) -> str:
        """The log of a run, once `text` is in it."""
        deadline = time.monotonic() + seconds
        while text not in (log := self.raylign("logs", run).stdout):
            assert time.monotonic() < deadline, log[-3000:]
            time.sleep(1)
        return log

    def close(self) -> None:
        """End the head and what it started; no other cluster of this machine."""
        if self.process is None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        psutil.wait_procs([*children, psutil.Process(self.process.pid)], timeout=20)
        for child in children:
            if child.is_running():
                child.kill()
        self.process.wait(timeout=20)

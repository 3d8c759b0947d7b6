"""Runs as Ray jobs, on a real cluster started with `ray start --head` and a token."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.ray


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """A head node of its own, and `raylign` as a user of it types it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "token").write_text(secrets.token_hex(32))
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
            "XDG_STATE_HOME": str(directory / "state"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
        }
        self.environment.pop("RAY_ADDRESS", None)
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", f"--temp-dir={directory}/ray",
            *(f"--{name}={free_port()}" for name in (
                "port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port",
                "runtime-env-agent-port",
            )),
        ]  # fmt: skip
        with (directory / "head.log").open("w") as log:
            self.head = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 90
        while self.raylign("status", "--address", self.address).returncode != 0:
            assert self.head.poll() is None, (directory / "head.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the cluster did not start"
            time.sleep(1)

    def raylign(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            env={**self.environment, **environment},
            cwd=self.directory / "project" if (self.directory / "project").is_dir() else self.directory,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def close(self) -> None:
        """End the head and what it started; no other cluster of this machine."""
        children = psutil.Process(self.head.pid).children(recursive=True)
        self.head.send_signal(signal.SIGTERM)
        psutil.wait_procs([*children, psutil.Process(self.head.pid)], timeout=20)
        for child in children:
            if child.is_running():
                child.kill()
        self.head.wait(timeout=20)


@pytest.fixture(scope="module")
def cluster(tiny_base: Path) -> Iterator[Cluster]:
    # Unix sockets of Ray live under it: a path of pytest's own would be too long.
    with tempfile.TemporaryDirectory(prefix="rj-", dir="/tmp") as directory:
        cluster = Cluster(Path(directory))
        try:
            project = cluster.directory / "project"
            project.mkdir()
            (project / "run.yaml").write_text(
                f"name: small\noutput_dir: {directory}/out\nmodel: {{base: {tiny_base}}}\n"
                "stages: {sft: {data: {source: 'builtin:arithmetic', max_rows: 64}, max_steps: 2}}\n"
            )
            yield cluster
        finally:
            cluster.close()


def test_a_submitted_run_trains_there_and_its_outcome_is_the_exit_code(cluster: Cluster) -> None:
    done = cluster.raylign("submit", "run.yaml", "--address", cluster.address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (cluster.directory / "out" / "sft" / "adapter" / "adapter_model.safetensors").is_file()
    assert (
        json.loads((cluster.directory / "out" / "run.json").read_text())["stages"]["sft"]["state"] == "done"
    )
    status = cluster.raylign("status", "small").stdout
    assert "succeeded" in status
    assert "sft" in cluster.raylign("logs", "small").stdout


def test_a_mistake_that_shows_there_comes_back_with_its_code_and_message(cluster: Cluster) -> None:
    arguments = ["name=broken", f"output_dir={cluster.directory}/broken", "model.base=/nowhere/base"]
    done = cluster.raylign("submit", "run.yaml", *arguments, "--address", cluster.address)
    assert done.returncode == 2
    assert "/nowhere/base" in done.stdout
    assert cluster.raylign("logs", "broken", "--follow").returncode == 2
    assert "already ended" in cluster.raylign("stop", "broken").stdout


def test_stop_lets_the_run_save_and_a_second_submission_goes_on(cluster: Cluster) -> None:
    output = cluster.directory / "long"
    arguments = [
        "name=long",
        f"output_dir={output}",
        "stages.sft.max_steps=100000",
        "stages.sft.save_steps=100000",
    ]
    arguments += ["--address", cluster.address, "--no-follow"]
    assert cluster.raylign("submit", "run.yaml", *arguments).returncode == 0
    again = cluster.raylign("submit", "run.yaml", *arguments)
    assert again.returncode == 2
    assert "already on this cluster" in again.stderr
    deadline = time.monotonic() + 120
    metrics = output / "sft" / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline, cluster.raylign("logs", "long").stdout[-3000:]
        time.sleep(1)
    stopped = cluster.raylign("stop", "long", "--timeout", "120")
    assert "stopped after saving" in stopped.stdout
    assert list((output / "sft").glob("checkpoint-*/manifest.json"))
    assert "stopped, saved" in cluster.raylign("status", "long").stdout
    assert cluster.raylign("submit", "run.yaml", *arguments).returncode == 0
    deadline = time.monotonic() + 120
    while "continues from checkpoint-" not in cluster.raylign("logs", "long").stdout:
        assert time.monotonic() < deadline
        time.sleep(1)
    cluster.raylign("stop", "long", "--now")


def test_a_missing_token_is_explained(cluster: Cluster) -> None:
    done = cluster.raylign("status", "--address", cluster.address, RAY_AUTH_MODE="disabled")
    assert done.returncode == 2
    assert "RAY_AUTH_MODE=token" in done.stderr


def test_an_unknown_run_and_a_silent_address_are_the_users_mistakes(cluster: Cluster) -> None:
    unknown = cluster.raylign("logs", "nobody", "--address", cluster.address)
    assert unknown.returncode == 2
    assert "no job or run is named 'nobody'" in unknown.stderr
    silent = cluster.raylign("status", "--address", f"http://127.0.0.1:{free_port()}")
    assert silent.returncode == 2
    assert "ray start --head" in silent.stderr


def test_the_command_line_goes_before_rays_own_variables(cluster: Cluster) -> None:
    done = cluster.raylign("status", "--address", cluster.address, RAY_ADDRESS="http://127.0.0.1:1")
    assert done.returncode == 0, done.stderr

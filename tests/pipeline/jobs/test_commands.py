"""Runs as Ray jobs, on a real cluster started with `ray start --head` and a token."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.pipeline.jobs.heads import Head, free_port

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tiny_base: Path) -> Iterator[Head]:
    # Unix sockets of Ray live under it: a path of pytest's own would be too long.
    with tempfile.TemporaryDirectory(prefix="rj-", dir="/tmp") as directory:
        token = Path(directory) / "token"
        token.write_text(secrets.token_hex(32))
        head = Head(Path(directory), {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
        try:
            (head.project / "run.yaml").write_text(
                f"name: small\noutput_dir: {directory}/out\nmodel: {{base: {tiny_base}}}\n"
                "stages: {sft: {data: {source: 'builtin:arithmetic', max_rows: 64}, max_steps: 2}}\n"
            )
            head.start()
            yield head
        finally:
            head.close()


def test_a_submitted_run_trains_there_and_its_outcome_is_the_exit_code(cluster: Head) -> None:
    done = cluster.raylign("submit", "run.yaml", "--address", cluster.address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (cluster.directory / "out" / "sft" / "adapter" / "adapter_model.safetensors").is_file()
    assert (
        json.loads((cluster.directory / "out" / "run.json").read_text())["stages"]["sft"]["state"] == "done"
    )
    status = cluster.raylign("status", "small").stdout
    assert "succeeded" in status
    assert "sft" in cluster.raylign("logs", "small").stdout


def test_a_mistake_that_shows_there_comes_back_with_its_code_and_message(cluster: Head) -> None:
    arguments = ["name=broken", f"output_dir={cluster.directory}/broken", "model.base=/nowhere/base"]
    done = cluster.raylign("submit", "run.yaml", *arguments, "--address", cluster.address)
    assert done.returncode == 2
    assert "/nowhere/base" in done.stdout
    assert cluster.raylign("logs", "broken", "--follow").returncode == 2
    assert "already ended" in cluster.raylign("stop", "broken").stdout


@pytest.mark.slow
def test_stop_lets_the_run_save_and_a_second_submission_goes_on(cluster: Head) -> None:
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


def test_a_missing_token_is_explained(cluster: Head) -> None:
    done = cluster.raylign("status", "--address", cluster.address, RAY_AUTH_MODE="disabled")
    assert done.returncode == 2
    assert "RAY_AUTH_MODE=token" in done.stderr


def test_an_unknown_run_and_a_silent_address_are_the_users_mistakes(cluster: Head) -> None:
    unknown = cluster.raylign("logs", "nobody", "--address", cluster.address)
    assert unknown.returncode == 2
    assert "no job or run is named 'nobody'" in unknown.stderr
    silent = cluster.raylign("status", "--address", f"http://127.0.0.1:{free_port()}")
    assert silent.returncode == 2
    assert "ray start --head" in silent.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [("RAY_ADDRESS", "http://127.0.0.1:1"), ("RAY_API_SERVER_ADDRESS", "127.0.0.1:1"), ("RAY_ADDRESS", "")],
)
def test_the_command_line_goes_before_rays_own_variables(cluster: Head, variable: str, value: str) -> None:
    done = cluster.raylign("status", "--address", cluster.address, **{variable: value})
    assert done.returncode == 0, done.stderr


def test_the_address_of_the_head_leads_to_its_dashboard(cluster: Head) -> None:
    for form in (f"127.0.0.1:{cluster.gcs_port}", f"127.0.0.1:{cluster.port}", f"{cluster.address}/"):
        done = cluster.raylign("status", "--address", form)
        assert done.returncode == 0, done.stderr
    named = cluster.raylign("status", RAY_ADDRESS=f"127.0.0.1:{cluster.gcs_port}")
    assert named.returncode == 0, named.stderr
    mixed = cluster.raylign("status", RAY_ADDRESS=f"http://127.0.0.1:{cluster.gcs_port}")
    assert mixed.returncode == 2
    assert "RAY_ADDRESS: a cluster's head answers at" in mixed.stderr
    assert "Traceback" not in mixed.stderr


def test_a_proxy_that_does_not_lead_to_the_cluster_is_named(cluster: Head) -> None:
    proxy = {"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": ""}
    done = cluster.raylign("status", "--address", cluster.address, **proxy)
    assert done.returncode == 2
    assert f"through the proxy of http_proxy ({proxy['http_proxy']})" in done.stderr
    assert "no_proxy=127.0.0.1" in done.stderr


def test_values_of_variables_reach_a_job_and_are_left_nowhere(cluster: Head) -> None:
    value, output = f"hf_{secrets.token_hex(16)}", cluster.directory / "secret"
    arguments = ["submit", "run.yaml", "name=secret", f"output_dir={output}", "ray.env=[SOME_TOKEN]"]
    arguments += ["--address", cluster.address]
    unset = cluster.raylign(*arguments)
    assert unset.returncode == 2
    assert "ray.env: SOME_TOKEN is not set here" in unset.stderr
    told = cluster.raylign(*arguments, f"logging.logging_steps={value}", SOME_TOKEN=value)
    assert told.returncode == 2
    done = cluster.raylign(*arguments, SOME_TOKEN=value)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SOME_TOKEN" in (output / "config.yaml").read_text()
    job = requests.get(
        f"{cluster.address}/api/jobs/",
        headers={"Authorization": f"Bearer {(cluster.directory / 'token').read_text()}"},
    )
    (ours,) = [one for one in job.json() if one["metadata"].get("raylign_run") == "secret"]
    assert {"RAYLIGN_HANDOVER"} < set(ours["runtime_env"]["env_vars"])
    assert "SOME_TOKEN" not in ours["runtime_env"]["env_vars"]
    assert value not in job.text
    files = [path for path in cluster.directory.rglob("*") if path.is_file()]
    assert [path for path in files if value.encode() in path.read_bytes()] == []
    again = cluster.raylign("logs", "secret")
    assert value not in again.stdout

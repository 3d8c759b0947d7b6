"""README's own path, from a local run to jobs, in a home with Ray's token and in one without."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.jobs.heads import Head

pytestmark = pytest.mark.ray


@pytest.fixture(
    params=[
        pytest.param(False, id="fresh home"),
        pytest.param(True, id="home with a token"),
    ]
)
def user(request: pytest.FixtureRequest, tiny_base: Path) -> Iterator[tuple[Head, Path]]:
    """A user's commands, and the file where Ray looks for a token of the user's."""
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as directory:
        token = Path(directory) / "home" / ".ray" / "auth_token"
        token.parent.mkdir(parents=True)
        if request.param:
            token.write_text(secrets.token_hex(32))
        head = Head(Path(directory), {"HOME": str(token.parents[1])})
        sft = "{data: {source: 'builtin:arithmetic', max_rows: 64}, max_steps: 2}"
        (head.project / "run.yaml").write_text(
            f"name: mine\nmodel: {{base: {tiny_base}}}\nstages: {{sft: {sft}}}\n"
        )
        try:
            yield head, token
        finally:
            head.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_local_run_then_a_head_then_jobs(user: tuple[Head, Path]) -> None:
    head, token = user
    asks = token.is_file()
    local = head.raylign("run", "run.yaml")
    assert local.returncode == 0, local.stderr
    assert token.is_file() == asks, "a local run must leave no token: every later cluster would ask for it"
    head.start()
    output = head.directory / "out"
    long = [f"output_dir={output}", "stages.sft.max_steps=100000", "stages.sft.save_steps=100000"]
    submit = ["submit", "run.yaml", *long, "--address", head.address, "--no-follow"]
    assert head.raylign(*submit).returncode == 0
    metrics, deadline = output / "sft" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size):
        assert time.monotonic() < deadline, head.raylign("logs", "mine").stdout[-3000:]
        time.sleep(1)
    assert "running" in head.raylign("status", "mine").stdout
    assert "sft" in head.raylign("logs", "mine").stdout
    assert "stopped after saving" in head.raylign("stop", "mine").stdout
    assert head.raylign(*submit).returncode == 0
    head.wait_for("mine", "continues from checkpoint-")
    assert head.raylign("stop", "mine", "--now").returncode == 0
    # Said explicitly, the mode holds: a token is shown or not, whatever the cluster asks for.
    assert (head.raylign("status", "mine", RAY_AUTH_MODE="token").returncode == 0) == asks
    refused = head.raylign("status", "mine", RAY_AUTH_MODE="disabled")
    assert (refused.returncode == 2) == asks
    assert ("RAY_AUTH_MODE=token" in refused.stderr) == asks

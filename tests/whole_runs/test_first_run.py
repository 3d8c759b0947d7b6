"""The first config of the README, run as a newcomer types it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import load
from pipeline.api import result_of


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
def test_the_first_config_of_the_readme_learns_and_leaves_what_the_page_says(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (repository / "README.md").read_text()
    block = re.search(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert "raylign run first.yaml" in page
    (tmp_path / "first.yaml").write_text(block[1])
    monkeypatch.chdir(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-m", "pipeline", "run", "first.yaml"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = result_of(load("first.yaml"))
    shares = [result.evaluations[name]["accuracy"] for name in ("base", "sft", "grpo")]
    assert [result.evaluations[name]["n"] for name in ("base", "sft", "grpo")] == [500] * 3
    assert shares[0] + 0.2 < shares[1] < shares[2] - 0.2
    for name in ("sft", "grpo"):
        weights = result.stages[name].weights
        assert weights is not None
        assert weights == result.directory / name / "adapter"
        assert (weights / "adapter_model.safetensors").is_file()
    assert result.report.is_file()
    assert "Held-out prompts" in done.stdout

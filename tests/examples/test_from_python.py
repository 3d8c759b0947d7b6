"""The example of runs from Python, started as its page says; the same calls again find everything done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

AGAIN = """
import sys
from examples.from_python import CONFIG, main
from pipeline import run

results = main(sys.argv[1])
losses = [results[rate].stages["sft"].metrics["loss"] for rate in ("1e-4", "1e-3")]
assert losses[1] < losses[0] < 0.392, losses
again = run(CONFIG, ["stages.sft.learning_rate=1e-3", f"output_dir={sys.argv[1]}/1e-3"])
found, made = again.stages["sft"], results["1e-3"].stages["sft"]
print("STATE", found.state, found.weights == made.weights)
"""


@pytest.mark.ray
def test_two_runs_in_one_process_and_a_third_that_has_nothing_left_to_do(
    repository: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "STATE skipped True" in done.stdout
    for rate in ("1e-4", "1e-3"):
        assert (tmp_path / "runs" / rate / "sft" / "adapter" / "adapter_config.json").is_file()
        assert (tmp_path / "runs" / rate / "report.html").is_file()

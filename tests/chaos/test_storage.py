"""Disks that are full or read-only while a run works on them: told, and nothing of what was done is lost."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.small_disk import SmallDisk, available
from tests.whole_runs.runs import (
    ENVIRONMENT,
    TINY_MOE,
    adapter_digest,
    calls,
    command_of,
    complete,
    start,
    when,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not available(), reason="needs mounts of its own (unshare --map-root-user --mount)"),
]


GRPO = {
    "data": {"source": "builtin:arithmetic", "split": "prompts", "max_rows": 64}, "rewards": "exact_match",
    "batch_size": 16, "num_generations": 4, "max_completion_length": 8, "max_length": 64,
    "learning_rate": 1e-3,
}  # fmt: skip


def config(output: Path) -> dict[str, Any]:
    """SFT on one rank, saved every other step."""
    sft = {
        "data": {"source": "builtin:arithmetic", "max_rows": 32}, "batch_size": 8, "max_steps": 30,
        "save_steps": 2, "max_length": 64,
    }  # fmt: skip
    return {
        "name": "disk", "output_dir": str(output), "model": {"base": str(TINY_MOE), "lora": {"r": 4}},
        "stages": {"sft": sft},
    }  # fmt: skip


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    small = SmallDisk(mount_point, "32m")
    yield small
    small.close()


def ends_on_a_full(disk: SmallDisk, process: subprocess.Popen[str]) -> None:
    """Fill the disk under a run: it says so and ends. Then there is room again."""
    disk.fill()
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1, said[-3000:]
    assert re.search(r"cannot write \S+: No space left on device", said), said[-3000:]
    assert "Traceback" not in said
    disk.empty()


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_save_ends_the_run_which_then_goes_on_with_the_same_adapter(
    disk: SmallDisk, tmp_path: Path
) -> None:
    """The disk is filled between two saves; steps go on until something has to be written."""
    run = disk.path / "run"
    command = command_of(tmp_path, config(run))
    process = start(command, tmp_path)
    when(process, (run / "sft" / "checkpoint-4" / "manifest.json").is_file)
    ends_on_a_full(disk, process)
    assert "sft: continues from checkpoint-" in complete(command, tmp_path)
    complete(command_of(tmp_path / "straight", config(tmp_path / "whole")), tmp_path)
    assert adapter_digest(run, "sft") == adapter_digest(tmp_path / "whole", "sft")


@pytest.mark.slow
@pytest.mark.vllm
def test_a_disk_that_is_full_in_a_sync_ends_the_run_which_then_goes_on_with_the_same_adapter(
    disk: SmallDisk, tmp_path: Path
) -> None:
    """A sync writes traces and logs alone, which end nothing; what is missed is the line of its step."""
    run = disk.path / "run"
    configs = [config(run), config(tmp_path / "whole")]
    for one in configs:
        one["stages"] = {"grpo": GRPO | {"save_steps": 2, "max_steps": 8}}
    command = command_of(tmp_path, configs[0])
    process = start(command, tmp_path)
    when(process, lambda: calls(run, "policy-0", "weight_source.prepare") >= 4)
    ends_on_a_full(disk, process)
    assert "grpo: continues from checkpoint-" in complete(command, tmp_path)
    complete(command_of(tmp_path / "straight", configs[1]), tmp_path)
    assert adapter_digest(run, "grpo") == adapter_digest(tmp_path / "whole", "grpo")


def test_a_disk_that_is_read_only_is_told_before_anything_is_done(disk: SmallDisk, tmp_path: Path) -> None:
    command = command_of(tmp_path, config(disk.path / "run"))
    disk.writable(False)
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said[-3000:]
    assert re.search(r"cannot write \S+: Read-only file system", said), said[-3000:]
    assert "Traceback" not in said
    disk.writable(True)
    assert list(disk.path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.vllm
def test_shared_memory_that_is_full_harms_no_sync(tmp_path: Path) -> None:
    """Weights go through memory that has no name there; Ray's own objects then lie on the disk."""
    whole, small = config(tmp_path / "whole"), config(tmp_path / "small")
    for one in (whole, small):
        one["stages"] = {"grpo": GRPO | {"max_steps": 3}}
    complete(command_of(tmp_path / "a", whole), tmp_path)
    inside = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    complete([*command, *command_of(tmp_path / "b", small)], tmp_path)
    assert adapter_digest(tmp_path / "small", "grpo") == adapter_digest(tmp_path / "whole", "grpo")

"""Runs that are asked to stop at many moments: saved, nothing more begun, nothing left, the same result."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.whole_runs.runs import (
    ENVIRONMENT,
    adapter_digest,
    command_of,
    complete,
    kill_when,
    lines_of,
    processes_with,
    when,
)

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]

REWARD = """
def noise(completions, **columns):
    return [sum(map(ord, answer[0]["content"])) % 7 / 7 for answer in completions]
"""
STAGES = ("sft", "dpo", "grpo")


def command_for(directory: Path, base: Path) -> list[str]:
    data = {"source": "builtin:arithmetic", "max_rows": 64}
    common = {"save_steps": 50, "learning_rate": 1e-3, "max_length": 96}
    stages: dict[str, Any] = {
        "sft": {
            "data": data | {"split": "train"}, "eval_data": data | {"split": "train"}, "eval_steps": 2,
            "batch_size": 8, "max_steps": 16, **common,
        },
        "dpo": {"data": data | {"split": "preference"}, "batch_size": 8, "max_steps": 3, **common},
        "grpo": {
            "data": data | {"split": "prompts"}, "rewards": "shaped:noise", "batch_size": 16,
            "num_generations": 4, "max_completion_length": 8, "staleness": 1, "max_steps": 8, **common,
        },
    }  # fmt: skip
    content = {
        "name": "stopping", "output_dir": str(directory / "run"), "seed": 3,
        "model": {"base": str(base), "lora": {"r": 4, "lora_alpha": 8}}, "stages": stages,
        "eval": {"data": data | {"split": "test"}, "max_rows": 20, "sampling": {"max_tokens": 8}},
    }  # fmt: skip
    command = command_of(directory, content)
    (directory / "shaped.py").write_text(REWARD)
    return command


class Marked:
    """A run whose processes can be told from all others: they inherit a variable."""

    def __init__(self, command: list[str], directory: Path, **options: Any) -> None:
        self.mark = f"RAYLIGN_TEST_{uuid.uuid4().hex}"
        self.process = subprocess.Popen(
            command, cwd=directory, env=ENVIRONMENT | {self.mark: "1"}, stderr=subprocess.STDOUT, text=True,
            **{"stdout": subprocess.PIPE, "start_new_session": True} | options,
        )  # fmt: skip

    def left(self) -> list[psutil.Process]:
        """Processes of the run that live."""
        return processes_with(self.mark)

    def ends(self, code: int, seconds: float = 120) -> str:
        """What it has said until it ended with this code; a moment later none of its processes is there."""
        said, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == code, said
        self.leaves_nothing()
        return said or ""

    def leaves_nothing(self, seconds: float = 2.0) -> None:
        deadline = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def logged(run: Path, stage: str) -> list[int]:
    """Steps in a stage's metrics, evaluations left out."""
    if not (run / stage / "metrics.jsonl").is_file():
        return []
    return [line["step"] for line in lines_of(run, stage) if "eval_loss" not in line]


def losses(run: Path, stage: str) -> list[tuple[int, float]]:
    """Step and loss of every line, evaluations as well."""
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines_of(run, stage)]


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    complete(command_for(directory, tiny_base), directory)
    return directory / "run"


def test_a_run_that_is_stopped_at_many_moments_ends_with_the_same_adapters(
    undisturbed: Path, tiny_base: Path, tmp_path: Path
) -> None:
    command, run = command_for(tmp_path, tiny_base), tmp_path / "run"

    def stopped(reached: Callable[[], bool], number: int, code: int = 75) -> str:
        marked = Marked(command, tmp_path)
        when(marked.process, reached)
        marked.process.send_signal(number)
        return marked.ends(code)

    # In its start-up there is nothing to save.
    said = stopped((run / "logs" / "fork-server.log").is_file, signal.SIGTERM)
    assert "stopping at once: no step has begun, so there is nothing to save\n" in said
    # In a step: that one is finished, and none after it.
    said = stopped(lambda: len(logged(run, "sft")) >= 3, signal.SIGTERM)
    answered = re.search(r"stopping after step (\d+), then saving; again: stop now without saving", said)
    assert answered is not None, said
    assert logged(run, "sft")[-1] == int(answered[1])
    assert (run / "sft" / f"checkpoint-{answered[1]}").is_dir()
    assert f"stopped after saving: sft at step {answered[1]} of 16." in said
    assert "Ray's own logs" not in said, "it has not failed"
    # In the last step of a stage: that stage is complete, and the next one not begun.
    said = stopped(lambda: len(logged(run, "dpo")) >= 2, signal.SIGINT)
    assert "stopping after step 3, the last of dpo, which is then saved as complete" in said
    assert (run / "dpo" / "manifest.json").is_file()
    assert not re.search(r"^grpo: ", said, re.MULTILINE)
    # Where samples of later steps are drawn already.
    said = stopped(lambda: len(logged(run, "grpo")) >= 2, signal.SIGHUP)
    done = logged(run, "grpo")[-1]
    assert f"stopping after step {done}, then saving" in said
    assert (run / "grpo" / f"checkpoint-{done}").is_dir()
    # A second signal: nothing is saved, and nothing left.
    marked = Marked(command, tmp_path)
    when(marked.process, lambda: len(logged(run, "grpo")) > done)
    marked.process.send_signal(signal.SIGTERM)
    marked.process.send_signal(signal.SIGINT)
    assert "stopping now without saving" in marked.ends(130, seconds=20)
    assert [path.name for path in run.glob("grpo/checkpoint-*")] == [f"checkpoint-{done}"]
    # In an evaluation, by the file.
    marked = Marked(command, tmp_path)
    when(marked.process, (run / "eval" / "base.json").is_file)
    (run / "STOP").touch()
    assert "stopping at once: the evaluation of" in marked.ends(75)
    complete(command, tmp_path)
    for stage in STAGES:
        assert adapter_digest(run, stage) == adapter_digest(undisturbed, stage), stage
        assert losses(run, stage) == losses(undisturbed, stage)


@pytest.mark.slow
def test_a_run_saves_when_its_terminal_is_closed(undisturbed: Path, tiny_base: Path, tmp_path: Path) -> None:
    command, run = command_for(tmp_path, tiny_base), tmp_path / "run"
    ours, theirs = pty.openpty()
    marked = Marked(
        command, tmp_path, stdout=theirs, stdin=theirs, start_new_session=False,
        preexec_fn=lambda: (os.setsid(), os.close(os.open(os.ttyname(0), os.O_RDWR))),
    )  # fmt: skip
    os.close(theirs)
    while len(logged(run, "sft")) < 3:
        os.read(ours, 4096)
        assert marked.process.poll() is None
    os.close(ours)
    assert marked.process.wait(60) == 75
    marked.leaves_nothing()
    done = logged(run, "sft")[-1]
    assert (run / "sft" / f"checkpoint-{done}").is_dir()
    assert f"continues from checkpoint-{done}" in complete(command, tmp_path)
    assert adapter_digest(run, "sft") == adapter_digest(undisturbed, "sft")


@pytest.mark.slow
def test_a_run_that_saves_by_time_goes_on_from_there_and_ends_with_the_same_adapter(
    undisturbed: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Samples that were drawn for the next step are in these checkpoints too."""
    command, run = command_for(tmp_path, tiny_base), tmp_path / "run"
    command.append("stages.grpo.save_minutes=0.0001")
    kill_when(command, tmp_path, (run / "grpo" / "checkpoint-3").is_dir)
    there = sorted(path.name for path in (run / "grpo").glob("checkpoint-*"))
    assert there[-1] in ("checkpoint-3", "checkpoint-4")
    assert len(there) <= 3, "save_total_limit, and one that was being removed"
    assert f"grpo: continues from {there[-1]}" in complete(command, tmp_path)
    for stage in STAGES:
        assert adapter_digest(run, stage) == adapter_digest(undisturbed, stage), stage


@pytest.mark.slow
def test_a_step_that_is_longer_than_the_grace_is_given_up_and_the_one_before_it_saved(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Steps of some seconds, on two ranks."""
    whole, given_up = tmp_path / "whole", tmp_path / "given-up"
    commands = {}
    for directory in (whole, given_up):
        directory.mkdir()
        command = command_for(directory, tiny_base)
        commands[directory] = [
            *command, "--until", "sft", "stages.sft.data.max_rows=6400", "stages.sft.batch_size=6000",
            "stages.sft.max_steps=3", "stages.sft.eval_data=null", "stages.sft.eval_steps=null",
            "roles.policy.workers=2", "limits.grace=3",
        ]  # fmt: skip
    complete(commands[whole], whole)
    run = given_up / "run"
    marked = Marked(commands[given_up], given_up)
    when(marked.process, lambda: len(logged(run, "sft")) >= 2)
    marked.process.send_signal(signal.SIGTERM)
    said = marked.ends(75)
    assert "step 3 is given up: " in said
    assert "stopped after saving: before step 3." in said
    assert [path.name for path in (run / "sft").glob("checkpoint-*")] == ["checkpoint-2"]
    assert "sft: continues from checkpoint-2" in complete(commands[given_up], given_up)
    assert adapter_digest(run, "sft") == adapter_digest(whole / "run", "sft")
    assert losses(run, "sft") == losses(whole / "run", "sft")


START_UP: dict[str, Callable[[Marked, Path], bool]] = {
    "as soon as its processes begin": lambda marked, run: len(marked.left()) > 1,
    "while its first workers start": lambda marked, run: any((run / "logs").glob("policy-*.log")),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", START_UP)
def test_nothing_is_left_of_a_run_that_ends_while_its_workers_start(
    moment: str, number: int, tiny_base: Path, tmp_path: Path
) -> None:
    command, run = command_for(tmp_path, tiny_base), tmp_path / "run"
    marked = Marked(command, tmp_path)
    when(marked.process, lambda: START_UP[moment](marked, run))
    marked.process.send_signal(number)
    marked.ends(75 if number == signal.SIGTERM else -signal.SIGKILL, seconds=30)


def test_nothing_is_left_of_a_run_that_fails_while_its_workers_start(tiny_base: Path, tmp_path: Path) -> None:
    """Rows that can't be used are found when the processes have begun their imports."""
    command = command_for(tmp_path, tiny_base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1", "completion": "2"}\n' * 8 + '{"prompt": "1+1"}\n')
    marked = Marked([*command, f"stages.sft.data={{source: {rows}}}"], tmp_path)
    assert "rows.jsonl" in marked.ends(2)

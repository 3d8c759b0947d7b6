"""Ranks that are killed at a moment of their work: others take their place, and everything that training says
and makes is what it would have been, bit for bit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.algorithms.sft import SftLoss
from actors.cluster import snapshots
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.errors import RunFailure
from actors.models.spec import LoraSpec, ModelSpec
from actors.trainer.remote import CLOCKS, ModelWorkers, host_group
from actors.trainer.spec import HostSpec, OptimSpec
from pipeline.artifacts.manifest import file_digest
from tests.actors.trainer.test_host_group import rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 6

Kill = Callable[[str], None]
"""Called at each moment by its name."""


@pytest.fixture
def training(ray_cluster: None, tiny_base: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Trains an adapter, and asks for it; what came out, and the lines on ranks that were replaced."""
    groups = []

    def train(workers: int, kill: Callable[[Any, str], None], **limits: Any) -> tuple[Any, list[str]]:
        said: list[str] = []
        name = f"policy{len(groups)}"
        group = host_group(name, RoleSpec(workers=workers), LimitsSpec(stop=1, **limits), tmp_path)
        groups.append(group.start())
        group.supervision.replaced = lambda one: said.append(str(one))
        spec = HostSpec(model=ModelSpec(base=str(tiny_base), lora=LoraSpec(r=4)))
        return steps(ModelWorkers(group), spec, tmp_path / name, lambda moment: kill(group, moment)), said

    yield train
    for group in groups:
        group.shutdown()


def steps(workers: ModelWorkers, spec: HostSpec, directory: Path, moment: Kill) -> Any:
    """A stage's calls in small: metrics of each step, log-probabilities, load of experts, digest of files."""
    building = workers.build(spec)
    moment("load")
    building.result()
    workers.add_adapter("start")
    workers.copy_adapter("start", "policy", trainable=True)
    moment("prepare")
    workers.prepare_training("policy", OptimSpec(learning_rate=1e-2), STEPS)
    metrics = []
    for step in range(STEPS):
        asked = [workers.logprobs(rows(4, 9), "start"), workers.update(rows(8, step), SftLoss(), step)]
        moment(f"update {step}")
        before, done = (one.result() for one in asked)
        metrics.append({**{k: v for k, v in done.items() if k not in CLOCKS}, "before": before.tolist()})
    moment("evaluate")
    after = workers.logprobs(rows(4, 9), "policy").result().tolist()
    load = workers.router_load("policy")
    moment("save")
    workers.save_adapter("policy", directory / "adapter")
    workers.save_checkpoint(directory / "checkpoint")
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digests = {str(path.relative_to(directory)): file_digest(path) for path in files}
    return metrics, after, np.asarray(load).tolist(), workers.frozen_digest(), digests


def nobody(group: Any, moment: str) -> None:
    """Kill nobody."""


class Killing:
    """kill -9 of a rank at some moments, or so many seconds after them."""

    def __init__(self, *moments: str, rank: int = 0, after: float = 0.0) -> None:
        self.moments, self.rank, self.after = list(moments), rank, after

    def __call__(self, group: Any, moment: str) -> None:
        if moment not in self.moments:
            return
        self.moments.remove(moment)
        threading.Timer(self.after, os.kill, (self.pid(group), signal.SIGKILL)).start()

    def pid(self, group: Any) -> int:
        """By its log: the process may be busy."""
        log = group.liveness.log(self.rank)
        while not (log.is_file() and "pid " in log.read_text()):
            time.sleep(0.01)
        return int(log.read_text().rpartition("pid ")[2].split()[0])


def test_a_rank_of_two_that_is_killed_is_replaced_and_nothing_else_differs(
    training: Callable[..., Any],
) -> None:
    expected, said = training(2, nobody)
    assert said == []
    found, said = training(2, Killing("update 3", "save", rank=1))
    assert found == expected
    assert len(said) == 2, said
    assert all("policy1-1 was replaced: its process died" in line for line in said)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("cost", [0.0, 1e9], ids=["each step is kept", "no step is kept"])
def test_a_rank_killed_at_any_moment_is_replaced_and_nothing_else_differs(
    training: Callable[..., Any], workers: int, cost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = training(workers, nobody)
    moments = ["load", "prepare", "update 0", "update 3", "evaluate", "save"]
    monkeypatch.setattr(snapshots, "cost", lambda facts: cost)
    found, said = training(workers, Killing(*moments), max_restarts=10)
    assert found == expected
    assert len(said) == len(moments), said


def test_a_call_that_kills_its_rank_three_times_ends_the_run(training: Callable[..., Any]) -> None:
    def kill(group: Any, moment: str) -> None:
        if moment == "update 2":
            group.supervision.replaced = lambda one: Killing(moment)(group, moment)
            Killing(moment)(group, moment)

    with pytest.raises(RunFailure, match="for the 3rd time at the same place") as caught:
        training(1, kill, max_restarts=10)
    assert caught.value.who == "policy0-0"

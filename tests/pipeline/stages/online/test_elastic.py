"""Engines that come and go between steps: samples stay the same, and nobody serves what was not proved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.sync.engine_state import WeightsState
from pipeline.artifacts.scaling import ScaleAnswer, answer_of, ask_to_scale, wanted_engines
from pipeline.stages.online.elastic import Elastic
from tests.actors.rollout.test_pool_and_sync import ENGINES, World
from tests.actors.sync.fake_groups import PATIENCE_S, Process, look_often


class Stage:
    """An online stage with pool, sync and engines of `World`, in a run directory."""

    def __init__(self, directory: Path, fan_out: int) -> None:
        self.directory, self.world, self.said = directory, World(0, "wait", fan_out), list[str]()
        self.elastic = Elastic(self.world.sync, directory, self.said.append)
        self.settled = 0
        self.world.sync.connect()
        self.world.sync.push(0)

    def settle(self) -> None:
        self.settled += 1

    def scale(self, engines: int) -> ScaleAnswer:
        """Ask, and let steps begin until there is an answer; samples are drawn in each of them."""
        key, until = ask_to_scale(self.directory, engines), time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            self.elastic.between_steps(self.settle)
            answer = answer_of(self.directory, key)
            if answer is not None:
                return answer
            self.step()
        raise AssertionError("no answer")

    def step(self) -> set[int]:
        """Draw, and bring a new version; the engines that drew."""
        for process in self.world.group.processes:
            process.waiting.clear()
        self.world.generate()
        drew = {process.rank for process in self.world.group.processes if process.waiting}
        self.world.push()
        self.world.watch()
        assert self.world.wrong == []
        return drew

    def states(self) -> list[WeightsState]:
        return [self.world.engines[rank].state for rank in self.world.engines]


@pytest.fixture(params=[4, 2], ids=["from the trainer", "passed on"])
def stage(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    look_often(monkeypatch)
    made = Stage(tmp_path, request.param)
    yield made
    made.world.group.close()


def test_added_engines_draw_once_a_sync_has_proved_its_version_there_and_removed_ones_are_gone(
    stage: Stage,
) -> None:
    assert stage.scale(5).said == (
        "rollout-3, rollout-4 admitted, to draw once the next sync has proved its version there; "
        "rollout has 5"
    )
    assert stage.states() == [WeightsState.SERVING] * 3 + [WeightsState.FRESH] * 2
    assert stage.step() == {0, 1, 2}
    assert stage.states() == [WeightsState.SERVING] * 5
    assert stage.step() == {0, 1, 2, 3, 4}
    assert stage.scale(1).said == "rollout-1, rollout-2, rollout-3, rollout-4 ended; rollout has 1 of 5"
    assert stage.step() == {0}
    assert stage.scale(4).done
    stage.step()
    assert stage.step() == {0, 1, 2, 3}
    assert stage.settled == 3, "nobody generates while engines come or go"


def test_what_the_cluster_has_no_room_for_is_refused_with_what_is_missing(stage: Stage) -> None:
    answer = stage.scale(6)
    assert (answer.said, answer.done) == (
        "no room for 6: missing: 1 GPU; rollout stays at 3",
        False,
    )
    assert stage.step() == {0, 1, 2}
    assert stage.scale(ENGINES).said == "rollout has 3 already"


def test_an_engine_that_dies_while_it_is_made_is_tried_again_and_at_last_not_added(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[int] = []
    load = Process.load

    def dying(self: Process, *args: Any) -> dict[str, float]:
        if self.rank >= ENGINES and len(deaths) < bound:
            deaths.append(self.rank)
            self.group.kill(self.rank)
        return load(self, *args)

    monkeypatch.setattr(Process, "load", dying)
    bound = 2
    assert stage.scale(4).done
    assert deaths == [3, 3]
    stage.step()
    assert stage.step() == {0, 1, 2, 3}
    bound = 99
    answer = stage.scale(5)
    assert answer.said.startswith("rollout-4 not added: rollout-4 failed")
    assert not answer.done
    assert stage.step() == {0, 1, 2, 3}


def test_engines_that_are_not_ready_when_the_stage_ends_are_ended(stage: Stage) -> None:
    key = ask_to_scale(stage.directory, 4)
    stage.elastic.between_steps(stage.settle)
    stage.elastic.end()
    answer = answer_of(stage.directory, key)
    assert answer is not None
    assert "not added: the stage was through" in answer.said
    assert stage.world.group.size == ENGINES


def test_only_a_number_of_engines_can_be_asked_for() -> None:
    assert wanted_engines(["rollout=3"]) == (3, [])
    bad = ["rollout=0", "rollout", "policy=2", "rollout=two"]
    number, problems = wanted_engines(bad)
    assert number is None
    assert [problem.partition(":")[0] for problem in problems] == bad
    assert "only the number of rollout engines can change" in problems[2]

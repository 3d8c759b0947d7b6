"""Checkpoints by steps and by time. The clock is the test's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.stages.context import Saves


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def saves(clock: Clock, *, minutes: float | None, steps: int = 50, needs_length: str = "") -> Saves:
    spec = SimpleNamespace(save_steps=steps, save_minutes=minutes, needs_length=needs_length)
    stage: Any = SimpleNamespace(spec=spec, total_steps=100)
    return Saves(stage, 0, clock)


def run(clock: Clock, found: Saves, seconds: float, steps: int = 100) -> list[int]:
    """Steps after which a stage saves whose steps take so long."""
    made = []
    for step in range(1, steps + 1):
        clock.now += seconds
        if found.due(step):
            found.made(step)
            made.append(step)
    return made


@pytest.mark.parametrize(
    ("minutes", "seconds", "made"),
    [
        (30, 1.0, [50, 100]),
        (30, 600.0, [3, 6, 9, 12]),
        (30, 2000.0, list(range(1, 13))),
        (None, 2000.0, [50, 100]),
    ],
    ids=["fast steps", "slow steps", "steps longer than that", "never by time"],
)
def test_a_stage_saves_every_so_many_steps_and_every_so_many_minutes(
    minutes: float | None, seconds: float, made: list[int]
) -> None:
    clock = Clock()
    found = run(clock, saves(clock, minutes=minutes), seconds, 100 if made[-1] == 100 else 12)
    assert found == made


def test_time_counts_from_the_last_checkpoint_of_either_kind() -> None:
    clock = Clock()
    assert run(clock, saves(clock, minutes=1, steps=3), 25.0, 6) == [3, 6]
    assert run(clock, saves(clock, minutes=1, steps=4), 25.0, 8) == [3, 4, 7, 8]


def test_the_last_step_is_saved_as_the_result_alone_where_nothing_can_go_on_from_it() -> None:
    clock = Clock()
    assert run(clock, saves(clock, minutes=1e-3, needs_length="lr_scheduler_type"), 1.0)[-1] == 99

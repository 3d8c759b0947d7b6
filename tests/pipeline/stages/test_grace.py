"""A step is given up where a grace period leaves no time for it, and only then. The clock is the test's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from actors.cluster import look_up
from pipeline.stages.context import GivenUp
from pipeline.stages.grace import Grace, gives_up


@pytest.mark.parametrize(
    ("left", "elapsed", "longest", "given_up"),
    [
        (25, 5, 10, False),  # five more, and eight to save
        (25, 1, 60, True),
        (25, 50, 60, False),
        (12, 50, 60, True),
        (25, 90, 60, False),  # longer than ever: it may end at any moment
        (7, 90, 60, True),
        (25, 3, None, False),  # the first one
        (7, 20, None, True),
    ],
)
def test_a_step_is_given_up_where_its_rest_and_a_save_are_longer_than_what_is_left(
    left: float, elapsed: float, longest: float | None, given_up: bool
) -> None:
    assert gives_up(left, elapsed, longest, 8.0) is given_up


class Times:
    """A clock, and SIGTERM at some moment."""

    now = 0.0
    asked: float | None = None

    def __call__(self) -> float:
        return self.now

    def left(self, grace_s: float) -> float | None:
        return None if self.asked is None else self.asked + grace_s - self.now


class Stage:
    """Steps of 60 s, in which somebody looks up every second."""

    def __init__(self, saves: Callable[[], bool], grace_s: float = 25) -> None:
        self.times, self.saves, self.said = Times(), saves, list[str]()
        stop: Any = self.times
        self.grace = Grace(stop, grace_s, self.said.append, self.times)

    def steps(self, number: int, asked_in: float | None = None) -> None:
        for step in range(1, number + 1):
            with self.grace.step(step, self.saves):
                for second in range(60):
                    if asked_in == second and step == number:
                        self.times.asked = self.times.now
                    self.times.now += 1
                    look_up()


def test_what_was_there_before_a_long_step_is_saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[float] = []
    stage = Stage(lambda: bool(saved.append(stage.times.now)) or True)
    with pytest.raises(GivenUp, match="before step 3"):
        stage.steps(3, asked_in=10)
    assert saved == [131]
    assert stage.said == ["step 3 is given up: 24 s of limits.grace are left"]


def test_a_step_that_ends_in_time_is_not_given_up() -> None:
    stage = Stage(lambda: pytest.fail("it was"))
    stage.steps(3, asked_in=45)
    assert stage.times.now == 180
    assert stage.said == []


def test_the_first_step_gets_all_but_the_time_for_a_save() -> None:
    saved: list[float] = []
    stage = Stage(lambda: bool(saved.append(stage.times.now)) or True)
    with pytest.raises(GivenUp):
        stage.steps(1, asked_in=0)
    assert saved == [18]


def test_a_step_that_was_applied_already_goes_on_and_is_asked_once() -> None:
    asked: list[float] = []
    stage = Stage(lambda: bool(asked.append(stage.times.now)))
    stage.steps(3, asked_in=10)
    assert len(asked) == 1
    assert stage.said[1] == "step 3 goes on: what was there before it can't be saved any more"


def test_a_save_takes_its_own_time_and_waits_of_its_own_do_not_save_again() -> None:
    """One of 6 s keeps 12 s; what is saved looks up too."""
    saved: list[float] = []

    def save() -> bool:
        saved.append(stage.times.now)
        look_up()
        return True

    stage = Stage(save)
    with stage.grace.saving():
        stage.times.now += 6
    with pytest.raises(GivenUp):
        stage.steps(1, asked_in=0)
    assert saved == [6 + 14]

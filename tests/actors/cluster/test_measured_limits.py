"""Deadlines from the first calls of a stage: what is measured, what holds, and what is said."""

from __future__ import annotations

import pytest

from actors.cluster.measured_limits import CALLS, FLOOR_S, MeasuredLimits
from actors.cluster.spec import LimitsSpec, Phase


def measured(
    seconds: list[float], phase: Phase = "update", **limits: float
) -> tuple[MeasuredLimits, list[str]]:
    said: list[str] = []
    found = MeasuredLimits(LimitsSpec(**limits), said.append)
    for one in seconds:
        found.took("policy", phase, "updates.update", one)
    return found, said


def of(found: MeasuredLimits, phase: Phase = "update") -> float:
    return found.of("policy", phase, "updates.update")


def test_the_default_holds_until_enough_calls_were_measured() -> None:
    for calls in range(CALLS):
        found, said = measured([1.0] * calls)
        assert (of(found), said) == (900, [])


def test_a_limit_is_ten_times_the_longest_call_and_is_said_once() -> None:
    found, said = measured([12.0, 7.0, 6.2, 6.0, 6.1])
    assert of(found) == 120
    assert said == ["limits.update of policy: 120 s: 10 x the longest of 3 calls (12.0 s), 60 at least"]


def test_a_limit_has_a_floor() -> None:
    found, said = measured([0.2, 0.1, 0.1])
    assert of(found) == FLOOR_S
    assert said == ["limits.update of policy: 60 s: 10 x the longest of 3 calls (0.2 s), 60 at least"]


def test_a_limit_is_the_default_at_most_but_never_close_to_what_calls_take() -> None:
    assert of(measured([200.0] * 3)[0]) == 900
    assert measured([200.0] * 3)[1] == []
    assert of(measured([500.0] * 3)[0]) == 1500


def test_a_limit_grows_with_calls_that_take_longer() -> None:
    found, said = measured([10.0] * 3 + [25.0])
    assert of(found) == 250
    assert len(said) == 1


def test_a_limit_leaves_room_for_answers_that_may_become_longer() -> None:
    found, _ = measured([10.0] * 2)
    found.saw("tokens of a sample", 200, most=2000)
    found.saw("tokens", 40_000, most=100_000)
    found.took("policy", "update", "updates.update", 10.0)
    assert of(found) == 300, "three times what ten times the work would take"
    found.saw("tokens of a sample", 2000, most=2000)
    found.saw("tokens", 90_000, most=100_000)
    assert of(found) == 100, "there is hardly more to come"


def test_an_explicit_limit_holds_whatever_is_measured() -> None:
    found, said = measured([0.1] * 5, update=700.0)
    assert (of(found), said) == (700, [])


@pytest.mark.parametrize("phase", ["start", "load", "save", "restore", "sync", "stop"])
def test_what_happens_seldom_or_depends_on_disk_and_network_keeps_its_default(phase: Phase) -> None:
    assert of(measured([0.1] * 5, phase)[0], phase) == LimitsSpec().of(phase)


def test_each_method_of_each_group_has_its_own_limit() -> None:
    found, _ = measured([0.1] * 3)
    assert found.of("critic", "update", "updates.update") == 900
    assert found.of("policy", "logprobs", "scores.values") == 900
    assert found.of("policy", "update", "another") == 900

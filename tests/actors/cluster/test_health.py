"""Fleet states: what an observation does to a process's state, and what no observation can do."""

from __future__ import annotations

import pytest

from actors.cluster.health import Event, Member, Members, State


def test_a_process_is_healthy_once_it_answered() -> None:
    assert Member().state is State.STARTING
    assert Member().after(Event.ANSWERED).state is State.HEALTHY


def test_a_dead_process_stays_dead_whatever_it_still_says() -> None:
    dead = Member().after(Event.DIED, "signal 9")
    for event in (Event.ANSWERED, Event.OVERDUE, Event.DIED):
        assert dead.after(event, "later").state is State.DEAD
        assert dead.after(event, "later").reason == "signal 9"


def test_only_a_restart_brings_a_dead_process_back_and_it_must_answer_first() -> None:
    restarted = Member().after(Event.DIED).after(Event.RESTARTED)
    assert restarted.state is State.STARTING
    assert restarted.generation == 1
    assert restarted.after(Event.ANSWERED).state is State.HEALTHY


def test_an_overdue_process_is_suspect_until_it_answers() -> None:
    suspect = Member().after(Event.ANSWERED).after(Event.OVERDUE, "update > 5 s")
    assert (suspect.state, suspect.reason) == (State.SUSPECT, "update > 5 s")
    answered = suspect.after(Event.ANSWERED)
    assert (answered.state, answered.reason) == (State.HEALTHY, "")


def test_an_observation_of_an_earlier_generation_changes_nothing() -> None:
    restarted = Member().after(Event.DIED, generation=0).after(Event.RESTARTED)
    assert restarted.after(Event.DIED, generation=0) == restarted
    assert restarted.after(Event.ANSWERED, generation=0) == restarted


@pytest.mark.parametrize("state", [State.STARTING, State.HEALTHY])
def test_a_process_that_serves_is_not_restarted(state: State) -> None:
    with pytest.raises(ValueError, match="stop it first"):
        Member(state).after(Event.RESTARTED)


def test_a_fleet_keeps_its_members_apart() -> None:
    members = Members.of(3).after([0, 1, 2], Event.ANSWERED).after([1], Event.DIED).after([2], Event.OVERDUE)
    assert members.ranks(State.HEALTHY) == [0]
    assert members.ranks(State.DEAD) == [1]
    assert members.ranks(State.SUSPECT) == [2]
    assert members.serving == [0]


def test_an_answer_of_a_healthy_process_changes_no_fleet() -> None:
    """Nor does it cost a look at every member: engines answer several times a step."""
    members = Members.of(3).after([0, 1, 2], Event.ANSWERED)
    assert members.after([1], Event.ANSWERED) is members
    assert members.after([1, 2], Event.DIED, "gone").serving == [0]

"""Fleet states: what an observation does to a process's state, and what no observation can do."""

from __future__ import annotations

import pytest

from actors.cluster.health import Member, Members, ProcessEvent, ProcessState


def test_a_process_is_healthy_once_it_answered() -> None:
    assert Member().state is ProcessState.STARTING
    assert Member().after(ProcessEvent.ANSWERED).state is ProcessState.HEALTHY


def test_a_dead_process_stays_dead_whatever_it_still_says() -> None:
    dead = Member().after(ProcessEvent.DIED, "signal 9")
    for event in (ProcessEvent.ANSWERED, ProcessEvent.OVERDUE, ProcessEvent.DIED):
        assert dead.after(event, "later").state is ProcessState.DEAD
        assert dead.after(event, "later").reason == "signal 9"


def test_only_a_restart_brings_a_dead_process_back_and_it_must_answer_first() -> None:
    restarted = Member().after(ProcessEvent.DIED).after(ProcessEvent.RESTARTED)
    assert restarted.state is ProcessState.STARTING
    assert restarted.generation == 1
    assert restarted.after(ProcessEvent.ANSWERED).state is ProcessState.HEALTHY


def test_an_overdue_process_is_suspect_until_it_answers() -> None:
    suspect = Member().after(ProcessEvent.ANSWERED).after(ProcessEvent.OVERDUE, "update > 5 s")
    assert (suspect.state, suspect.reason) == (ProcessState.SUSPECT, "update > 5 s")
    answered = suspect.after(ProcessEvent.ANSWERED)
    assert (answered.state, answered.reason) == (ProcessState.HEALTHY, "")


def test_one_that_was_late_serves_once_it_answers_and_may_be_restarted_all_the_same() -> None:
    members = Members.of(2).after([0, 1], ProcessEvent.ANSWERED).after([1], ProcessEvent.OVERDUE, "late")
    assert [members.sound(rank) for rank in (0, 1)] == [True, False]
    answered = members.after([1], ProcessEvent.ANSWERED)
    assert (answered.serves(1), answered.sound(1)) == (True, False)
    restarted = answered.after([1], ProcessEvent.RESTARTED).after([1], ProcessEvent.ANSWERED)
    assert (restarted.members[1].generation, restarted.sound(1)) == (1, True)
    with pytest.raises(ValueError, match="stop it first"):
        restarted.after([1], ProcessEvent.RESTARTED)


def test_an_observation_of_an_earlier_generation_changes_nothing() -> None:
    restarted = Member().after(ProcessEvent.DIED, generation=0).after(ProcessEvent.RESTARTED)
    assert restarted.after(ProcessEvent.DIED, generation=0) == restarted
    assert restarted.after(ProcessEvent.ANSWERED, generation=0) == restarted


@pytest.mark.parametrize("state", [ProcessState.STARTING, ProcessState.HEALTHY])
def test_a_process_that_serves_is_not_restarted(state: ProcessState) -> None:
    with pytest.raises(ValueError, match="stop it first"):
        Member(state).after(ProcessEvent.RESTARTED)


def test_a_fleet_keeps_its_members_apart() -> None:
    members = (
        Members.of(3)
        .after([0, 1, 2], ProcessEvent.ANSWERED)
        .after([1], ProcessEvent.DIED)
        .after([2], ProcessEvent.OVERDUE)
    )
    assert members.ranks(ProcessState.HEALTHY) == [0]
    assert members.ranks(ProcessState.DEAD) == [1]
    assert members.ranks(ProcessState.SUSPECT) == [2]
    assert members.serving == [0]


def test_an_answer_of_a_healthy_process_changes_no_fleet() -> None:
    """Nor does it cost a look at every member: engines answer several times a step."""
    members = Members.of(3).after([0, 1, 2], ProcessEvent.ANSWERED)
    assert members.after([1], ProcessEvent.ANSWERED) is members
    assert members.after([1, 2], ProcessEvent.DIED, "gone").serving == [0]

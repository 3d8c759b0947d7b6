"""The supervisor: what is replaced, what ends a run, and that no order of losses gets around its bounds."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from actors.cluster.supervision import Replaced, Supervision
from actors.cluster.supervisor import SAME_PLACE, Decision, End, Lost, Replace, RestartBounds, Supervisor
from actors.errors import RunFailure


def lost(at: float, place: str = "", rank: int = 0, role: str = "policy") -> Lost:
    return Lost(role, rank, place, "its process died", at)


def decisions(bounds: RestartBounds, *losses: Lost, size: int = 1) -> list[Decision]:
    supervisor, found = Supervisor(bounds), []
    for loss in losses:
        supervisor, decision = supervisor.after([loss], size)
        found.append(decision)
    return found


def test_a_process_that_is_lost_is_replaced() -> None:
    _, decision = Supervisor().after([lost(0.0, rank=2), lost(0.0, rank=5)], 8)
    assert decision == Replace("policy", (2, 5))


def test_one_loss_more_than_the_bound_ends_the_run_with_the_history() -> None:
    *before, last = decisions(
        RestartBounds(2, 100.0), lost(0, "update of step 3"), lost(40), lost(60, "a save")
    )
    assert before == [Replace("policy", (0,))] * 2
    assert isinstance(last, End)
    assert "after policy was replaced 2 times within 100 s (limits.max_restarts: 2)" in last.reason
    assert "60 s ago policy-0 (update of step 3): its process died; 20 s ago policy-0:" in last.reason


def test_a_role_of_many_may_lose_as_many_times_more() -> None:
    found = decisions(RestartBounds(1, 100.0), *[lost(i, rank=i % 4) for i in range(5)], size=4)
    assert [type(one) for one in found] == [Replace] * 4 + [End]


def test_losses_of_one_moment_count_one_by_one() -> None:
    supervisor, first = Supervisor(RestartBounds(1, 100.0)).after([lost(0, rank=r) for r in range(3)], 4)
    assert isinstance(first, Replace)
    assert isinstance(supervisor.after([lost(1, rank=r) for r in range(2)], 4)[1], End)


def test_what_lies_outside_the_window_is_forgotten() -> None:
    found = decisions(RestartBounds(1, 10.0), *[lost(11.0 * i, "the same place") for i in range(20)])
    assert {type(one) for one in found} == {Replace}


def test_the_third_loss_at_the_same_place_ends_the_run_and_says_so() -> None:
    there = "update of step 7"
    *before, last = decisions(
        RestartBounds(9, 100.0), lost(0, there), lost(1, "a save"), lost(2, there), lost(3, there)
    )
    assert [type(one) for one in before] == [Replace] * 3
    assert isinstance(last, End)
    assert f"for the 3rd time at the same place ({there})" in last.reason


def test_places_that_are_not_known_are_never_the_same() -> None:
    found = decisions(RestartBounds(9, 100.0), *[lost(i) for i in range(9)])
    assert {type(one) for one in found} == {Replace}


def test_all_ranks_that_a_node_takes_with_it_are_lost_at_their_place_once() -> None:
    together = [lost(0, "update of step 7", rank=rank) for rank in range(8)]
    assert isinstance(Supervisor().after(together, 8)[1], Replace)


def test_nothing_is_replaced_where_nothing_may_be() -> None:
    (only,) = decisions(RestartBounds(0), lost(0))
    assert isinstance(only, End)
    assert "limits.max_restarts is 0" in only.reason


def test_losses_of_several_roles_are_not_one_decision() -> None:
    with pytest.raises(ValueError, match="one role at a time"):
        Supervisor().after([lost(0), lost(0, role="critic")], 1)


@pytest.mark.parametrize("seed", range(50))
def test_no_order_of_losses_gets_more_replaced_than_the_bounds_allow(seed: int) -> None:
    draw = random.Random(seed)
    bounds = RestartBounds(draw.randint(1, 3), draw.choice([5.0, 20.0, 1000.0]))
    sizes = {"policy": draw.randint(1, 4), "critic": 1, "rollout": 3}
    places = ["", "update of step 1", "update of step 2", "start of rollout-1"]
    supervisor, now, ended = Supervisor(bounds), 0.0, False
    replaced: list[Lost] = []
    for _ in range(60):
        now += draw.expovariate(1.0)
        role = draw.choice(sorted(sizes))
        ranks = draw.sample(range(sizes[role]), draw.randint(1, sizes[role]))
        losses = [lost(now, draw.choice(places), rank, role) for rank in ranks]
        supervisor, decision = supervisor.after(losses, sizes[role])
        assert not (ended and isinstance(decision, Replace)), "a run that ends replaces nothing"
        ended = ended or isinstance(decision, End)
        if isinstance(decision, Replace):
            replaced += losses
        within = [loss for loss in replaced if now - loss.at < bounds.window]
        for name, size in sizes.items():
            assert sum(loss.role == name for loss in within) <= bounds.max_restarts * size
        moments = Counter(
            (role, place) for role, place, _ in {(x.role, x.place, x.at) for x in within if x.place}
        )
        assert max(moments.values(), default=0) < SAME_PLACE


def test_the_supervisor_of_a_run_raises_with_the_name_of_who_was_lost_too_often() -> None:
    clock = iter([0.0, 5.0])
    supervision = Supervision(RestartBounds(1, 60.0), lambda: next(clock))
    supervision.lost("critic", 1, {0: "its process died"}, "update of step 1")
    with pytest.raises(RunFailure, match="5 s ago critic-0") as caught:
        supervision.lost("critic", 1, {0: "no answer within 60 s"}, next_step="look at its log")
    assert (caught.value.who, caught.value.next_step) == ("critic-0", "look at its log")
    assert [loss.reason for loss in supervision.history] == ["its process died", "no answer within 60 s"]


def test_each_replacement_is_told_when_it_is_lost_and_when_another_is_in_its_place() -> None:
    clock = iter([0.0, 1.0, 4.0, 5.0])
    supervision, told = Supervision(RestartBounds(3, 60.0), lambda: next(clock)), list[Replaced | str]()
    supervision.tell, supervision.replaced = told.append, told.append
    supervision.lost("policy", 2, {1: "its process died"}, "update of step 1")
    assert told == ["policy-1 was lost: its process died; another takes its place"]
    supervision.lost("rollout", 2, {1: "no answer within 60 s"})
    supervision.remade("rollout", 1, "its process was replaced")
    supervision.back("policy", [0, 1])
    assert told[2:] == [
        "policy-1 was replaced: its process died; update of step 1 is done again (4.0 s to replace)",
        Replaced("policy", 1, "its process died", "update of step 1", 4.0),
    ]
    del told[:]
    supervision.back("rollout", [1])
    assert told == [
        "rollout-1 was replaced: no answer within 60 s (4.0 s to replace)",
        Replaced("rollout", 1, "no answer within 60 s", "", 4.0),
    ]


def test_who_was_not_lost_is_not_told_to_be_back() -> None:
    supervision, told = Supervision(RestartBounds()), list[Replaced]()
    supervision.replaced = told.append
    supervision.back("rollout", range(4))
    supervision.remade("rollout", 2, "it was left staged")
    supervision.back("rollout", [1])
    assert told == []
    supervision.back("rollout", [2])
    supervision.back("rollout", [2])
    assert [(one.rank, one.reason) for one in told] == [(2, "it was left staged")]

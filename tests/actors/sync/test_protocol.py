"""The decisions of a weight sync, without processes."""

from __future__ import annotations

import dataclasses

import pytest

from actors.sync.protocol import (
    CommitReport,
    Failure,
    Offer,
    StageAck,
    decide,
    decide_links,
    mismatch_in_commit,
    mismatch_in_version,
)
from actors.sync.relay_tree import TOP

OFFER = Offer(version=3, bytes=640, tensors=4, digest="d", manifest_digest="m")


def ack(**other: object) -> StageAck:
    return StageAck(**{**dataclasses.asdict(OFFER), **other})  # type: ignore[arg-type]


# --- All or nobody --------------------------------------------------------------------------------


def test_all_commit_when_every_engine_acknowledged_exactly_what_was_offered() -> None:
    decision = decide(OFFER, {0: ack(), 1: ack()})
    assert decision.commit
    assert decision.discard == decision.dead == decision.refusals == ()


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("version", 2),
        ("tensors", 3),
        ("algorithm", "sums"),
        ("manifest_digest", "x"),
        ("bytes", 639),
        ("digest", "x"),
    ],
)
def test_one_differing_acknowledgement_keeps_everybody_from_committing(what: str, value: object) -> None:
    decision = decide(OFFER, {0: ack(), 1: ack(**{what: value})})
    assert not decision.commit
    assert decision.discard == (0, 1)
    assert decision.refusals == (
        f"engine 1: acknowledged {what} {value}, the trainer offered {getattr(OFFER, what)}",
    )


def test_a_dead_engine_is_to_be_replaced_and_the_others_forget_what_they_staged() -> None:
    decision = decide(OFFER, {0: Failure("its process died", died=True), 1: ack()})
    assert (decision.commit, decision.dead, decision.discard, decision.refusals) == (False, (0,), (1,), ())


def test_an_engine_that_refuses_is_not_asked_again() -> None:
    decision = decide(OFFER, {0: Failure("half a group", died=False), 1: ack()})
    assert (decision.commit, decision.dead, decision.discard) == (False, (), (1,))
    assert decision.refusals == ("engine 0: half a group",)


CHAIN = {0: TOP, 1: 0, 2: 1, 3: 1}
"""Who sends to each engine."""
GONE = Failure("the other end is gone", died=False, link=True)


def test_those_below_a_dead_engine_are_neither_dead_nor_refuse() -> None:
    decision = decide(OFFER, {0: ack(), 1: Failure("died", died=True), 2: GONE, 3: GONE}, CHAIN)
    assert (decision.commit, decision.dead, decision.refusals, decision.discard) == (False, (1,), (), (0,))
    assert decision.not_passed_on == (), "the dead one is to blame"


def test_an_engine_that_had_the_version_and_did_not_pass_it_on_is_named_once_for_each_below_it() -> None:
    decision = decide(OFFER, {0: ack(), 1: ack(), 2: GONE, 3: GONE}, CHAIN)
    assert (decision.dead, decision.refusals, decision.discard) == ((), (), (0, 1))
    assert decision.not_passed_on == ((1, 2), (1, 3))
    deeper = decide(OFFER, {0: ack(), 1: GONE, 2: GONE, 3: GONE}, CHAIN)
    assert deeper.not_passed_on == ((0, 1),), "who had nothing could pass nothing on"


def test_an_engine_that_the_trainer_itself_can_not_reach_is_as_good_as_dead() -> None:
    assert decide(OFFER, {0: GONE, 1: ack()}).dead == (0,)
    assert decide(OFFER, {0: GONE, 1: GONE, 2: GONE, 3: GONE}, CHAIN).dead == (0,)


def test_other_bytes_are_told_of_whoever_passed_them_on() -> None:
    decision = decide(OFFER, {0: ack(), 1: ack(), 2: ack(), 3: ack(digest="x")}, CHAIN)
    assert decision.refusals == (
        "engine 3: acknowledged digest x, the trainer offered d; it came by way of engine 1, which had "
        "acknowledged what was offered",
    )
    wrong = dict.fromkeys((1, 2, 3), ack(digest="x"))
    named = decide(OFFER, {0: ack(), **wrong}, CHAIN).refusals
    assert ["by way of" in one for one in named] == [True, False, False]


def test_connections_that_can_not_be_made_cost_whoever_the_trainer_can_not_reach() -> None:
    died = Failure("its process died", died=True)
    decision = decide_links({1: died, 2: GONE, 3: GONE}, CHAIN)
    assert (decision.commit, decision.dead, decision.not_passed_on) == (False, (1,), ())
    assert decide_links({0: GONE}, CHAIN).dead == (0,)
    assert decide_links({2: GONE}, CHAIN).not_passed_on == ((1, 2),)


def test_a_commit_has_to_bind_every_tensor_of_its_version() -> None:
    def report(**other: int) -> CommitReport:
        return CommitReport(**{"version": 3, "bound": 9, "expected": 9, **other}, seconds={})

    assert mismatch_in_commit(3, report()) is None
    assert mismatch_in_commit(3, report(bound=8)) == "bound 8 of 9 tensors"
    assert mismatch_in_commit(3, report(bound=0, expected=0)) == "bound 0 of 0 tensors"
    assert mismatch_in_commit(3, report(version=2)) == "committed version 2, not 3"


@pytest.mark.parametrize(
    ("current", "offered", "allowed"), [(-1, 0, True), (3, 4, True), (3, 3, False), (3, 2, False)]
)
def test_only_a_newer_version_is_taken(current: int, offered: int, allowed: bool) -> None:
    assert (mismatch_in_version(current, offered) is None) == allowed

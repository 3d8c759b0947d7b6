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
    mismatch_in_commit,
    mismatch_in_version,
)

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

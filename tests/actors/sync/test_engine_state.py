"""States of one engine's weights: each step of the protocol, and every order that is none."""

from __future__ import annotations

import random

import pytest

from actors.cluster.health import Member, ProcessState
from actors.sync.engine_state import Engine, WeightsEvent, WeightsState
from actors.sync.protocol import NO_VERSION


def after(*events: WeightsEvent, version: int = 3) -> Engine:
    engine = Engine()
    for event in events:
        engine = engine.after(event, version)
    return engine


UP = (WeightsEvent.ACKNOWLEDGED, WeightsEvent.COMMITTED, WeightsEvent.VERIFIED)


def test_an_engine_serves_a_version_only_once_it_is_verified() -> None:
    assert after().state is WeightsState.FRESH
    assert after(*UP[:2]) == Engine(WeightsState.COMMITTED, NO_VERSION)
    assert after(*UP) == Engine(WeightsState.SERVING, 3)


def test_a_staged_version_that_is_discarded_leaves_what_was_served() -> None:
    assert after(*UP, WeightsEvent.ACKNOWLEDGED, WeightsEvent.DISCARDED) == Engine(WeightsState.SERVING, 3)
    assert after(WeightsEvent.ACKNOWLEDGED, WeightsEvent.DISCARDED) == Engine(WeightsState.FRESH)


def test_a_lost_engine_comes_back_with_the_base_and_under_a_new_number() -> None:
    lost = after(*UP, WeightsEvent.ACKNOWLEDGED).after(WeightsEvent.FAILED, reason="killed")
    assert lost == Engine(WeightsState.LOST, NO_VERSION, reason="killed")
    restarted = lost.after(WeightsEvent.RESTARTED)
    assert restarted == Engine(WeightsState.STARTING, NO_VERSION, generation=1)
    assert restarted.after(WeightsEvent.LOADED) == Engine(WeightsState.FRESH, NO_VERSION, generation=1)


@pytest.mark.parametrize(
    "events",
    [
        (WeightsEvent.COMMITTED,),
        (WeightsEvent.VERIFIED,),
        (WeightsEvent.ACKNOWLEDGED, WeightsEvent.VERIFIED),
        (*UP[:2], WeightsEvent.DISCARDED),
        (*UP[:2], WeightsEvent.ACKNOWLEDGED),
        (*UP, WeightsEvent.RESTARTED),
        (WeightsEvent.FAILED, WeightsEvent.LOADED),
        (WeightsEvent.FAILED, WeightsEvent.RESTARTED, WeightsEvent.ACKNOWLEDGED),
        (WeightsEvent.FAILED, WeightsEvent.ACKNOWLEDGED),
        (WeightsEvent.FAILED, WeightsEvent.COMMITTED),
    ],
)
def test_no_step_of_the_protocol_can_be_left_out(events: tuple[WeightsEvent, ...]) -> None:
    with pytest.raises(ValueError, match="engine can't be"):
        after(*events)


def test_an_event_of_an_earlier_generation_changes_nothing() -> None:
    second = after(WeightsEvent.FAILED, WeightsEvent.RESTARTED)
    for event in WeightsEvent:
        assert second.after(event, 9, "late", generation=0) is second


def test_an_engine_is_lost_with_its_process_and_with_one_that_took_its_place() -> None:
    serving = after(*UP)
    assert serving.in_process(Member(ProcessState.HEALTHY)) is serving
    dead = serving.in_process(Member(ProcessState.DEAD, reason="killed"))
    assert (dead.state, dead.version, dead.reason) == (WeightsState.LOST, NO_VERSION, "killed")
    replaced = serving.in_process(Member(ProcessState.HEALTHY, generation=1))
    assert (replaced.state, replaced.reason) == (WeightsState.LOST, "its process was replaced")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_seen_in_whatever_order_a_served_version_was_verified_on_this_very_engine(
    seed: int,
) -> None:
    """4,000 events of random generations; the mistakes of a caller are refused and change nothing."""
    generator = random.Random(seed)
    engine, seen, deaths = Engine(), list[WeightsEvent](), 0
    verified: set[tuple[int, int]] = set()
    events = [*WeightsEvent, WeightsEvent.LOADED] + list(UP) * 3
    for _ in range(4000):
        event, version = generator.choice(events), generator.randrange(9)
        generation = max(0, engine.generation - generator.choice((0, 0, 0, 1, 2)))
        before = engine
        try:
            engine = engine.after(event, version, "why", generation)
        except ValueError:
            continue
        if generation != before.generation:
            assert engine is before
            continue
        seen.append(event)
        deaths += engine.state is WeightsState.LOST and before.state is not WeightsState.LOST
        if engine.generation != before.generation:
            assert (before.state, engine.state) == (WeightsState.LOST, WeightsState.STARTING)
            seen = []
        if event is WeightsEvent.VERIFIED:
            path = [one for one in seen if one is not WeightsEvent.DISCARDED]
            assert tuple(path[-3:]) == UP, "no step of the protocol was left out"
            verified.add((engine.generation, version))
        if engine.version != NO_VERSION:
            assert (engine.generation, engine.version) in verified
            assert engine.state not in (WeightsState.LOST, WeightsState.STARTING)
        assert engine.state is not WeightsState.SERVING or engine.version != NO_VERSION
    # Once per loss, and never more often.
    assert engine.generation == deaths - (engine.state is WeightsState.LOST)
    assert engine.generation > 10
    assert len(verified) > 10

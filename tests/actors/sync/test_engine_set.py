"""The set of engines under threads: who replaces a lost one, who may call it, and who waits for whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.cluster.health import ProcessEvent
from actors.cluster.supervision import Replaced
from actors.errors import RunFailure
from actors.sync.engine_set import EngineSet
from actors.sync.engine_state import WeightsEvent, WeightsState
from tests.actors.sync.fake_groups import PATIENCE_S, FakeEngines

UP = (WeightsEvent.LOADED, WeightsEvent.ACKNOWLEDGED, WeightsEvent.COMMITTED, WeightsEvent.VERIFIED)


@pytest.fixture
def group() -> Iterator[FakeEngines]:
    made = FakeEngines(2, pause=lambda: None)
    yield made
    made.close()


def set_of(group: FakeEngines, load: Callable[[int], object] | None = None) -> EngineSet:
    return EngineSet(group, load)  # type: ignore[arg-type]


def die(group: FakeEngines, rank: int) -> None:
    """Kill a process, and see it."""
    group.kill(rank)
    with pytest.raises(RunFailure, match="its process died"):
        group.submit_rank(rank, "readback", 0, phase="sync").result()


def test_engines_of_a_sync_are_ready_once_a_version_is_verified_and_stay_so_while_the_next_is_staged(
    group: FakeEngines,
) -> None:
    engines, ready = set_of(group), []
    for event in (*UP, WeightsEvent.ACKNOWLEDGED):
        engines.saw(0, 0, event, version=3)
        ready.append(engines.ready(0))
    assert ready == [False, False, False, True, True]
    engines.saw(0, 0, WeightsEvent.COMMITTED)
    assert (engines.ready(0), engines.ready(0, unproved=True)) == (False, True)


def test_engines_that_their_owner_has_loaded_are_ready_until_they_are_lost(group: FakeEngines) -> None:
    engines = set_of(group, load=lambda rank: None)
    die(group, 1)
    assert ([engines.ready(rank) for rank in engines], engines.lost()) == ([True, False], [1])
    assert engines[1].reason == "its process died"


def test_of_all_threads_that_saw_one_death_one_replaces_the_engine(group: FakeEngines) -> None:
    loaded: list[int] = []
    engines = set_of(group, load=loaded.append)
    replaced: list[Replaced] = []
    group.supervision.replaced = replaced.append
    die(group, 0)
    together = threading.Barrier(8)

    def replace(_: int) -> int:
        together.wait(PATIENCE_S)
        replacement = engines.replace(0, 0, "killed")
        replacement.done.result(PATIENCE_S)
        return replacement.generation

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(replace, range(8))) == {1}
    assert loaded == [0]
    assert [(one.role, one.rank, one.reason) for one in replaced] == [("rollout", 0, "killed")]
    assert group.fleet.members[0].generation == 1
    assert engines.ready(0)


def test_a_process_that_was_late_is_replaced_though_it_has_answered_another_call_since(
    group: FakeEngines,
) -> None:
    engines = set_of(group, load=lambda rank: None)
    for event in (ProcessEvent.ANSWERED, ProcessEvent.OVERDUE, ProcessEvent.ANSWERED):
        group.fleet = group.fleet.after([0], event)
    engines.replace(0, 0, "no answer within 40 s").done.result(PATIENCE_S)
    assert group.fleet.members[0].generation == 1


def test_an_engine_that_is_lost_while_it_is_loaded_is_replaced_again_and_the_first_one_changes_nothing(
    group: FakeEngines,
) -> None:
    first_goes_on, times = threading.Event(), []

    def load(rank: int) -> None:
        times.append(rank)
        if len(times) == 1:
            first_goes_on.wait(PATIENCE_S)

    engines = set_of(group, load)
    die(group, 0)
    first = engines.replace(0, 0, "killed")
    while not times:
        time.sleep(0.001)
    die(group, 0)
    second = engines.replace(0, first.generation, "killed again")
    second.done.result(PATIENCE_S)
    first_goes_on.set()
    first.done.result(PATIENCE_S)
    assert (first.generation, second.generation, engines[0].generation) == (1, 2, 2)
    assert engines[0].state is WeightsState.FRESH


def test_a_call_meant_for_an_engine_never_reaches_its_successor(group: FakeEngines) -> None:
    engines = set_of(group, load=lambda rank: None)
    die(group, 0)
    engines.bring_back(0)

    def call(rank: int) -> None:
        raise AssertionError("it was sent")

    with pytest.raises(RunFailure, match="it was replaced"):
        engines.submit(0, 0, call)  # type: ignore[arg-type]
    assert (engines.is_alive(0, 0), engines.is_alive(0, 1)) == (False, True)


def test_a_replacement_that_fails_is_raised_to_everyone_who_waits_for_it(group: FakeEngines) -> None:
    def load(rank: int) -> None:
        raise RunFailure("rollout-0", "load", "no room")

    engines = set_of(group, load)
    die(group, 0)
    replacement = engines.replace(0, 0, "killed")
    with pytest.raises(RunFailure, match="no room"):
        replacement.done.result(PATIENCE_S)
    assert engines.replace(0, 0, "killed") is replacement
    assert (engines[0].state, engines.ready(0)) == (WeightsState.LOST, False)
    assert engines.is_alive(0, 1), "its process lives: another one would fail alike"


def test_an_engine_that_failed_in_a_living_process_is_made_anew_inside_of_it(group: FakeEngines) -> None:
    engines = set_of(group, load=lambda rank: None)
    engines.saw(0, 0, WeightsEvent.FAILED, "half of two versions")
    engines.bring_back(0)
    assert (engines[0].generation, engines[0].process) == (1, 0)
    assert group.fleet.members[0].generation == 0

"""Work and waiting of each process over time. Times are small numbers instead of seconds since the epoch."""

from __future__ import annotations

import json

import pytest

from pipeline.report.timeline import (
    LANES,
    Bar,
    Call,
    bars,
    chrome_trace,
    detail_window,
    last_execution,
    online_window,
    shown_lanes,
    syncs,
    to_calls,
    waiting,
)


def call(lane: str, phase: str, start: float, end: float) -> Call:
    return Call(lane, phase, phase, start, end)


def steps(count: int) -> list[Call]:
    """A sync of 1 s in two calls, 4 s of generation, 3 s of updates: 8 s a step; and a last sync."""
    calls = []
    for step in range(count):
        at = 8.0 * step
        calls += [call("policy-0", "sync", at, at + 0.4), call("rollout-0", "sync", at + 0.4, at + 1)]
        calls += [call("rollout-0", "generate", at + 1, at + 5), call("policy-0", "update", at + 5, at + 8)]
    return [*calls, call("policy-0", "sync", 8.0 * count, 8.0 * count + 1)]


def test_time_between_calls_is_laid_at_the_door_of_those_who_worked() -> None:
    calls = [
        call("policy-0", "update", 0, 4),
        call("rollout-0", "generate", 5, 9),
        call("rollout-1", "generate", 5, 7),
    ]
    waits = {one.lane: one for one in waiting(calls, (0.0, 10.0))}
    assert waits["policy-0"].busy == pytest.approx(0.4)
    assert waits["policy-0"].waits == pytest.approx({"rollout": 0.4, "driver": 0.2})
    assert waits["rollout-1"].busy == pytest.approx(0.2)
    assert waits["rollout-1"].waits == pytest.approx({"policy": 0.4, "rollout": 0.2, "driver": 0.2})
    assert next(iter(waits["rollout-1"].waits)) == "policy"


def test_time_in_which_two_roles_worked_is_shared_between_them() -> None:
    calls = [call("a-0", "update", 0, 2), call("b-0", "update", 0, 2), call("c-0", "update", 2, 4)]
    waits = {one.lane: one.waits for one in waiting(calls, (0.0, 4.0))}
    assert waits["c-0"] == pytest.approx({"a": 0.25, "b": 0.25})


def test_a_sync_is_what_lies_between_two_generations() -> None:
    assert syncs(steps(2)) == [(0.0, 1.0), (8.0, 9.0), (16.0, 17.0)]
    assert online_window(steps(2)) == (1.0, 17.0)
    assert online_window([call("policy-0", "update", 0, 4)]) is None


def test_the_detail_is_whole_steps_from_the_end_of_a_sync() -> None:
    assert detail_window(steps(1)) is None
    start, end = detail_window(steps(20)) or (0.0, 0.0)
    assert (start - 1) % 8 == 0
    assert end - start == 24.0


def test_calls_that_touch_become_one_bar() -> None:
    calls = [call("p-0", "update", 0, 1), call("p-0", "update", 1.01, 2), call("p-0", "sync", 2, 3)]
    assert bars(calls, 0.1) == [Bar("update", 0, 2), Bar("sync", 2, 3)]
    assert len(bars(calls, 0.001)) == 3


def test_a_large_run_is_drawn_by_the_first_process_of_each_role() -> None:
    calls = [call(f"rollout-{rank}", "generate", 5, 6) for rank in range(LANES)]
    assert len(shown_lanes(calls)) == LANES
    assert shown_lanes([*calls, call("policy-0", "load", 0, 1)]) == ["policy-0", "rollout-0"]


def test_only_the_last_execution_counts() -> None:
    earlier, later, evaluated = (call("p-0", "update", at, at + 1) for at in (0, 100, 9000))
    assert last_execution([earlier, later, evaluated], 90, 50) == [later]
    assert last_execution([earlier, later], 90, None) == [later]
    assert last_execution([earlier], 90, 50) == [earlier], "clocks that disagree hide nothing"


def test_lines_that_are_cut_or_of_another_shape_are_left_out() -> None:
    rows = [
        {"method": "update", "phase": "update", "start": 1, "end": 2, "step": 3},
        {"start": 1},
        {"end": "x"},
    ]
    assert to_calls("policy-0", rows) == [Call("policy-0", "update", "update", 1.0, 2.0, 3)]


def test_the_chrome_trace_has_a_process_per_role_and_microseconds() -> None:
    calls = [
        call("policy-0", "update", 100, 100.5),
        Call("policy-1", "values", "logprobs", 101, 102, 7, "critic"),
    ]
    events = json.loads(json.dumps(chrome_trace(calls)))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [(e["pid"], e["tid"], e["ts"], e["dur"]) for e in slices] == [
        (0, 0, 0, 500_000),
        (0, 1, 1_000_000, 1_000_000),
    ]
    assert slices[1]["args"] == {"step": 7, "role": "critic"}
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"policy", "policy-0", "policy-1"}

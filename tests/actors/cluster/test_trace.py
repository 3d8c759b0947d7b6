"""The trace of a process's calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.cluster.trace import BEGINNINGS, CallTrace, named


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_call_is_a_line_with_its_times_and_the_failed_one_says_so(tmp_path: Path) -> None:
    trace = CallTrace(tmp_path / "trace" / "policy-0.jsonl")
    with trace.call("update", "update", {"step": 3, "role": "critic"}):
        pass
    with pytest.raises(KeyError), trace.call("scores", "logprobs"):
        raise KeyError("no head")
    first, second = lines(trace.path)
    assert {key: first[key] for key in ("method", "phase", "step", "role")} == {
        "method": "update",
        "phase": "update",
        "step": 3,
        "role": "critic",
    }
    assert 1.6e9 < first["start"] <= first["end"] <= second["start"]  # type: ignore[operator]
    # More memory than an interpreter has, and no less later on.
    assert 5e6 < first["peak_rss"] <= second["peak_rss"]  # type: ignore[operator]
    assert second["error"] == "KeyError"
    assert "step" not in second


def test_calls_are_noted_at_their_beginning_where_a_test_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BEGINNINGS, "1")
    trace = CallTrace(tmp_path / "policy-0.jsonl")
    with trace.call("update", "update"):
        (begun,) = lines(tmp_path / "policy-0.begun")
        assert not trace.path.exists()
    (done,) = lines(trace.path)
    assert begun == {key: done[key] for key in ("method", "phase", "start")}
    monkeypatch.delenv(BEGINNINGS)
    with CallTrace(tmp_path / "policy-1.jsonl").call("update", "update"):
        pass
    assert not (tmp_path / "policy-1.begun").exists()


def test_a_call_goes_on_where_its_trace_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("a file where the directory should be")
    with CallTrace(tmp_path / "trace" / "policy-0.jsonl").call("update", "update"):
        done = True
    assert done


def test_step_and_role_are_found_by_place_or_by_name() -> None:
    def update(batch: object, loss: object, step: int, role: str | None = None) -> None: ...

    assert named(update, ["b", "l", 4], {}) == {"step": 4}
    assert named(update, ["b", "l"], {"step": 4, "role": "critic"}) == {"step": 4, "role": "critic"}
    assert named(update, [], {}) == {}


def test_a_wall_clock_that_is_set_in_the_middle_of_a_call_does_not_change_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = CallTrace(tmp_path / "policy-0.jsonl")
    with trace.call("update", "update"):
        monkeypatch.setattr("time.time", lambda: 1.6e9)
    (line,) = lines(trace.path)
    assert 0 <= line["end"] - line["start"] < 1  # type: ignore[operator]

"""Trackers: TensorBoard for real; stand-ins for the packages that need an account or a server."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from pipeline.monitoring.trackers import open_trackers, tracker_problems


class Recorder:
    """A stand-in for a package: every call is kept as (name, args, kwargs) and returns the recorder."""

    def __init__(self, calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]], prefix: str = "") -> None:
        self.calls, self.prefix = calls, prefix
        self.info = types.SimpleNamespace(run_id="run-7")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plant a recording module under a package's name; gives back its list of calls."""

    def plant(package: str) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        recorder, module = Recorder(calls), types.ModuleType(package)
        module.__getattr__ = lambda name: getattr(recorder, name)  # type: ignore[method-assign]
        monkeypatch.setitem(sys.modules, package, module)
        return calls

    return plant


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    found = {}
    for tag in events.Tags()["tensors"]:
        found[tag] = [(e.step, float(e.tensor_proto.float_val[0])) for e in events.Tensors(tag)]
    return found


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trackers = open_trackers(["tensorboard"], "demo", tmp_path, {})
    trackers.log("sft", 1, {"loss": 2.5, "step": 1, "note": "text", "broken": float("nan")})
    trackers.log("sft", 2, {"loss": 1.5})
    trackers.log("dpo", 1, {"rewards/margins": 0.25})
    trackers.close()
    assert scalars(tmp_path / "tensorboard") == {
        "sft/loss": [(1, 2.5), (2, 1.5)],
        "dpo/rewards/margins": [(1, 0.25)],
    }


def test_every_unknown_and_missing_tracker_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.monitoring.trackers._installed", lambda package: False)
    with pytest.raises(UserError) as caught:
        open_trackers(["wandb", "mlflow", "trackio", "comet"], "demo", Path("nowhere"), {})
    assert len(caught.value.problems) == 4
    assert 'pip install "raylign[trackers]"' in caught.value.problems[0]
    assert "'comet' is not a tracker; one of: tensorboard, wandb, mlflow, trackio" in caught.value.problems[3]


def test_a_package_that_is_really_missing_is_found_out() -> None:
    from pipeline.monitoring.trackers import _installed

    assert _installed("json")
    assert not _installed("no_such_package_anywhere")
    assert tracker_problems([]) == []


def test_wandb_gets_a_step_axis_per_stage_and_resumes_under_one_id(tmp_path: Path, planted: Any) -> None:
    calls = planted("wandb")
    for _ in range(2):
        trackers = open_trackers(["wandb"], "demo", tmp_path, {"seed": 0})
        trackers.log("sft", 3, {"loss": 1.0})
        trackers.close()
    inits = [kwargs for name, _, kwargs in calls if name == "init"]
    assert inits[0]["id"] == inits[1]["id"]
    assert (inits[0]["name"], inits[0]["resume"], inits[0]["config"]) == ("demo", "allow", {"seed": 0})
    assert ("define_metric", ("sft/*",), {"step_metric": "sft/step"}) in calls
    assert ("log", ({"sft/step": 3, "sft/loss": 1.0},), {}) in calls
    assert calls[-1][0] == "finish"


def test_mlflow_continues_the_run_that_it_began(tmp_path: Path, planted: Any) -> None:
    calls = planted("mlflow")
    for _ in range(2):
        trackers = open_trackers(["mlflow"], "demo", tmp_path, {})
        trackers.log("dpo", 5, {"loss": 0.5})
        trackers.close()
    starts = [kwargs for name, _, kwargs in calls if name == "start_run"]
    assert starts == [{"run_name": "demo"}, {"run_id": "run-7"}]
    assert ("log_metrics", ({"dpo/loss": 0.5},), {"step": 5}) in calls
    assert calls[-1][0] == "end_run"


def test_trackio_resumes_under_the_same_name(tmp_path: Path, planted: Any) -> None:
    calls = planted("trackio")
    for _ in range(2):
        trackers = open_trackers(["trackio"], "demo", tmp_path, {})
        trackers.log("sft", 1, {"loss": 0.5})
        trackers.close()
    inits = [kwargs for name, _, kwargs in calls if name == "init"]
    assert inits[0]["name"] == inits[1]["name"]
    assert inits[0]["name"].startswith("demo-")
    assert ("log", ({"sft/step": 1, "sft/loss": 0.5},), {}) in calls


def test_a_tracker_that_fails_later_is_dropped_with_one_note(tmp_path: Path, planted: Any) -> None:
    planted("wandb")
    notes: list[str] = []
    trackers = open_trackers(["wandb"], "demo", tmp_path, {}, notes.append)

    def lost(*_: Any) -> None:
        raise ConnectionError("no route to host")

    trackers._trackers["wandb"].log = lost  # type: ignore[method-assign]
    for step in (1, 2):
        trackers.log("sft", step, {"loss": 1.0})
    trackers.close()
    assert notes == ["wandb: ConnectionError: no route to host; the run goes on without it"]


def test_a_tracker_that_cannot_be_opened_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("wandb")

    def init(**_: Any) -> None:
        raise RuntimeError("api_key not configured")

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match="'wandb' could not be opened: RuntimeError: api_key not configured"):
        open_trackers(["wandb"], "demo", tmp_path, {})

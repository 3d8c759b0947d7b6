"""Passes metrics on to TensorBoard, Weights & Biases, MLflow and Trackio (`logging.report_to`).

The run directory holds all metrics of a run; a tracker gets a copy. So a tracker that is not
installed is refused before the run starts, and one that fails later is dropped with a note: a lost network
must not cost a training run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.errors import UserError

PROJECT = "raylign"
"""Project (W&B, Trackio) or experiment (MLflow) that runs go to unless the tracker's own variable says."""

IDS_FILE = "trackers.json"
"""In the run directory: each tracker's id of this run, so that a resumed run goes on in the same one."""


class Tracker(ABC):
    """One destination of metrics. Tags are `STAGE/METRIC`; steps are the stage's own."""

    package: str
    """Name that is imported, and installed."""

    def __init__(self, run_name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        self.run_name, self.run_dir, self.config = run_name, run_dir, config
        self.start()

    @abstractmethod
    def start(self) -> None:
        """Open the run at the destination."""

    @abstractmethod
    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Pass on the finite metrics of one step."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left and end the run there."""

    def remembered_id(self) -> str | None:
        """The id that this tracker gave this run before, if there is one."""
        return read_ids(self.run_dir).get(self.package)

    def remember_id(self, run_id: str) -> None:
        """Keep the tracker's id of this run in the run directory."""
        path = self.run_dir / IDS_FILE
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps({**read_ids(self.run_dir), self.package: run_id}, indent=2) + "\n")
        aside.replace(path)


def read_ids(run_dir: Path) -> dict[str, str]:
    """The trackers' ids of a run; empty when there are none or the file can't be read."""
    try:
        ids = json.loads((run_dir / IDS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}


class TensorBoardTracker(Tracker):
    """Event files in `RUN_DIR/tensorboard`, by TensorBoard's own writer (no torch, no TensorFlow)."""

    package = "tensorboard"

    def start(self) -> None:
        from tensorboard.summary import Writer

        self.writer = Writer(str(self.run_dir / "tensorboard"))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(f"{stage}/{key}", value, step)
        # The writer's own interval is two minutes: longer than a short stage.
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbTracker(Tracker):
    """Weights & Biases. Each stage has its own step axis: a W&B step can't start again at 0."""

    package = "wandb"

    def start(self) -> None:
        import wandb

        run_id = self.remembered_id() or uuid.uuid4().hex[:12]
        self.stages: set[str] = set()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.run_name,
            id=run_id,
            resume="allow",
            dir=str(self.run_dir),
            config=dict(self.config),
        )
        self.remember_id(run_id)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self.stages:
            self.run.define_metric(f"{stage}/step")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in metrics.items()}})

    def close(self) -> None:
        self.run.finish()


class MlflowTracker(Tracker):
    """MLflow, at its own MLFLOW_TRACKING_URI or its default."""

    package = "mlflow"

    def start(self) -> None:
        import mlflow

        self.mlflow = mlflow
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(PROJECT)
        run_id = self.remembered_id()
        if run_id is not None:
            mlflow.start_run(run_id=run_id)
            return
        self.remember_id(mlflow.start_run(run_name=self.run_name).info.run_id)
        mlflow.log_dict(dict(self.config), "config.json")

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({f"{stage}/{key}": value for key, value in metrics.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class TrackioTracker(Tracker):
    """Trackio, Hugging Face's local-first tracker."""

    package = "trackio"

    def start(self) -> None:
        import trackio

        # Trackio resumes by name, so the name has to be this run's alone.
        name = self.remembered_id() or f"{self.run_name}-{uuid.uuid4().hex[:6]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run = trackio.init(project=project, name=name, config=dict(self.config), resume="allow")
        self.remember_id(name)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in metrics.items()}})

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}


def tracker_problems(report_to: Sequence[str]) -> list[str]:
    """Every name in `report_to` that is unknown or not installed, each with what to do."""
    problems = []
    for name in report_to:
        if name not in TRACKERS:
            problems.append(f"logging.report_to: '{name}' is not a tracker; one of: {', '.join(TRACKERS)}")
        elif not _installed(TRACKERS[name].package):
            problems.append(
                f"logging.report_to: '{name}' needs the package '{TRACKERS[name].package}', which is not "
                f"installed: pip install \"raylign[trackers]\", or take '{name}' out of report_to"
            )
    return problems


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        # A module that was put into sys.modules by hand has no spec, and is importable all the same.
        return True


class Trackers:
    """The trackers of one run behind one call. One that fails is closed to further calls, with one note."""

    def __init__(self, trackers: Mapping[str, Tracker], note: Callable[[str], None]) -> None:
        self._trackers = dict(trackers)
        self._note = note

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Pass the numbers among `metrics` on; texts, lists and non-finite values stay in metrics.jsonl."""
        numbers = {key: float(value) for key, value in metrics.items() if key != "step" and is_number(value)}
        for name in list(self._trackers):
            self._guarded(name, lambda tracker: tracker.log(stage, step, numbers))

    def close(self) -> None:
        """End the run at every tracker."""
        for name in list(self._trackers):
            self._guarded(name, lambda tracker: tracker.close())
        self._trackers.clear()

    def _guarded(self, name: str, call: Callable[[Tracker], None]) -> None:
        try:
            call(self._trackers[name])
        except Exception as error:  # no fault of a tracker's library may end the run
            del self._trackers[name]
            self._note(f"{name}: {type(error).__name__}: {error}; the run goes on without it")


def is_number(value: object) -> bool:
    """True for a finite number (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def open_trackers(
    report_to: Sequence[str],
    run_name: str,
    run_dir: Path | str,
    config: Mapping[str, Any],
    note: Callable[[str], None] = print,
) -> Trackers:
    """Open every tracker named in `report_to`. UserError lists each that is unknown, missing or won't open.

    `config` is the resolved config as plain values; `note` gets one line if a tracker fails later on.
    """
    problems = tracker_problems(report_to)
    if problems:
        raise UserError(problems)
    opened: dict[str, Tracker] = {}
    for name in dict.fromkeys(report_to):
        try:
            opened[name] = TRACKERS[name](run_name, Path(run_dir), config)
        except Exception as error:  # not logged in, no server, no permission: the user has to settle it
            problems.append(
                f"logging.report_to: '{name}' could not be opened: {type(error).__name__}: {error}"
            )
    if problems:
        Trackers(opened, note).close()
        raise UserError(problems)
    return Trackers(opened, note)

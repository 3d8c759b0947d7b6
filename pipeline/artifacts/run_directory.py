"""A run's directory: its lock, and run.json with the states and results of its stages."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from actors.errors import UserError
from pipeline.artifacts.manifest import disk_errors, write_json


class RunDirectory:
    """`runs/NAME`: config.yaml, run.json, one directory per stage, eval/, logs/."""

    def __init__(self, path: str | Path, name: str) -> None:
        self.path = Path(path).absolute()
        self.name = name
        self.state: dict[str, Any] = {"name": name, "stages": {}, "eval": {}}
        self._lock: IO[str] | None = None

    def stage(self, name: str) -> Path:
        """Directory of a stage."""
        return self.path / name

    @property
    def logs(self) -> Path:
        """Directory of the actors' output, a file per role and rank."""
        return self.path / "logs"

    @property
    def stop_file(self) -> Path:
        """Its presence asks the run to save and stop (`raylign stop`)."""
        return self.path / "STOP"

    @contextlib.contextmanager
    def opened(self, *, fresh: bool = False) -> Iterator[RunDirectory]:
        """Hold the directory for this process alone; refuse another run's, or one in use.

        Raises:
            UserError: the directory belongs to another run, holds something else, or is in use.
            RunFailure: it cannot be written.
        """
        self.refuse_foreign()
        with disk_errors(self.path, "open the run directory"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise UserError(
                f"output_dir: {self.path} is in use by {holder}; wait for that run, stop it "
                f"(`raylign stop {self.name}` for a submitted one), or give this run another output_dir"
            ) from None
        try:
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} since {time.strftime('%H:%M:%S')}")
            self._lock.flush()
            if fresh:
                self._clear()
            self._read_state()
            self.save()
            self.stop_file.unlink(missing_ok=True)
            yield self
        finally:
            self._lock.close()

    def refuse_foreign(self) -> None:
        """Refuse a path that is not this run's directory, without opening it.

        Raises:
            UserError: a file, a directory with other things in it, or another run's directory.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir: {self.path} is a file; name a directory")
        if not self.path.is_dir():
            return
        entries = {p.name for p in self.path.iterdir()} - {".lock"}
        record = self.path / "run.json"
        if entries and not record.is_file() and not entries <= {"logs", "submitted.json"}:
            raise UserError(
                f"output_dir: {self.path} holds files but no run.json, so it is not a run directory; "
                "name an empty or new directory"
            )
        if record.is_file():
            other = self._load(record).get("name")
            if other != self.name:
                raise UserError(
                    f"output_dir: {self.path} belongs to the run {other!r}, this one is named {self.name!r}; "
                    f"use another output_dir, or set name: {other} to go on with that run"
                )

    def read(self) -> dict[str, Any]:
        """Content of run.json, without opening the directory; empty where no run has begun.

        Raises:
            UserError: run.json can't be read.
        """
        self._read_state()
        return self.state

    @staticmethod
    def _load(record: Path) -> dict[str, Any]:
        try:
            state = json.loads(record.read_text())
            if not isinstance(state, dict):
                raise ValueError("not a mapping")
            return state
        except ValueError as error:
            raise UserError(
                f"{record}: not readable ({error}). Remove that file: finished stages are recognised by "
                "their own manifests and are not redone"
            ) from None

    def _read_state(self) -> None:
        record = self.path / "run.json"
        if record.is_file():
            self.state = {"stages": {}, "eval": {}, **self._load(record)}

    def _clear(self) -> None:
        """Remove everything but the lock (`--fresh`)."""
        for entry in self.path.iterdir():
            if entry.name == ".lock":
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def record(self, **changes: Any) -> None:
        """Change top-level entries of run.json."""
        self.state.update(changes)
        self.save()

    def record_stage(self, name: str, **changes: Any) -> None:
        """Change a stage's entry of run.json, e.g. `state="running"`."""
        self.state["stages"].setdefault(name, {}).update(changes)
        self.save()

    def save(self) -> None:
        """Write run.json, atomically."""
        with disk_errors(self.path, "write run.json"):
            write_json(self.path / "run.json", self.state)


def clear_stage(directory: Path) -> None:
    """Set a stage's old directory aside before it runs again; it is removed when the new one is complete."""
    if not directory.exists():
        return
    previous = directory.with_name(f".{directory.name}.previous")
    if previous.exists():  # An interrupted re-run: the directory in place is its unfinished attempt.
        shutil.rmtree(directory)
        return
    os.rename(directory, previous)


def drop_previous(directory: Path) -> None:
    """Remove what `clear_stage` set aside; its successor is complete."""
    shutil.rmtree(directory.with_name(f".{directory.name}.previous"), ignore_errors=True)

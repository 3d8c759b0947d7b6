"""A run's directory: its lock, and run.json with the states and results of its stages."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from actors.errors import UserError
from pipeline.artifacts.manifest import MANIFEST, disk_errors, write_json
from pipeline.artifacts.scaling import clear_requests

BEFORE_THE_RECORD = frozenset({".lock", ".run.json.tmp", "logs", "submitted.json", "STOP"})
"""What may be in a run directory before its first run.json is: a full disk or a kill can come between."""


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
            self._lock = (self.path / ".lock").open("a+", errors="replace")
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
            clear_requests(self.path)
            yield self
        finally:
            self._lock.close()

    @staticmethod
    def in_use(path: Path) -> bool:
        """True where a run works in a directory at this moment."""
        try:
            with (path / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # No run has been here, or nothing can be asked.
            return False
        return False

    def refuse_foreign(self) -> None:
        """Refuse a path that is not this run's directory, without opening it.

        Raises:
            UserError: a file, a directory with other things in it, or another run's directory.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"output_dir: {self.path} is a file; name a directory")
            if not self.path.is_dir():
                return
            entries = {p.name for p in self.path.iterdir()}
        except OSError as error:
            raise UserError(f"output_dir: {self.path} can't be read ({error.strerror})") from None
        record = self.path / "run.json"
        if record.exists():
            other = self._load(record)["name"]
            if other != self.name:
                raise UserError(
                    f"output_dir: {self.path} belongs to the run {other!r}, this one is named {self.name!r}; "
                    f"use another output_dir, or set name: {other} to go on with that run"
                )
        elif entries - BEFORE_THE_RECORD and not self._was_this_runs(entries):
            ours = (
                ", or, if this is the directory of that run all the same, put "
                f'{{"name": "{self.name}"}} into its run.json'
            )
            raise UserError(
                f"output_dir: {self.path} holds files but no run.json, so it is not a run directory; "
                f"name an empty or new directory{ours if '.lock' in entries else ''}"
            )

    def _was_this_runs(self, entries: set[str]) -> bool:
        """True for a directory of this run whose run.json was lost or removed: its config has the name, and
        there is something that only a run leaves. A config alone may be the user's own file."""
        left = ".lock" in entries or any(self.path.glob(f"*/{MANIFEST}"))
        return left and _name_in(self.path / "config.yaml") == self.name

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
            if not record.is_file() and record.exists():  # Reading a pipe would wait for ever.
                raise ValueError("not a file")
            state = json.loads(record.read_text(encoding="utf-8"))
            if not isinstance(state, dict):
                raise ValueError("not a mapping")
            if not isinstance(state.get("name"), str):
                raise ValueError("names no run")
            for key in ("stages", "eval"):
                inner = state.setdefault(key, {})
                if not isinstance(inner, dict) or not all(isinstance(one, dict) for one in inner.values()):
                    raise ValueError(f"`{key}` is not a mapping of mappings")
            return state
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{record}: not readable ({error}). Remove it and run the same config again: finished stages "
                "are recognised by their own manifests and are not redone"
            ) from None

    def _read_state(self) -> None:
        record = self.path / "run.json"
        if record.exists():
            self.state = self._load(record)

    def _clear(self) -> None:
        """Remove everything but the lock (`--fresh`); run.json last, by which the directory is known."""
        entries = sorted(self.path.iterdir(), key=lambda entry: entry.name == "run.json")
        with disk_errors(self.path, "clear the run directory"):
            for entry in entries:
                if entry.name != ".lock":
                    whole = entry.is_dir() and not entry.is_symlink()
                    shutil.rmtree(entry) if whole else entry.unlink()

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


def clear_stage(directory: Path, keep: Sequence[str] = ()) -> None:
    """Set a stage's old directory aside before it runs again; it is removed when the new one is complete.
    Files named in `keep` stay."""
    if not directory.exists():
        return
    previous, kept = directory.with_name(f".{directory.name}.previous"), {}
    for name in keep:
        if (directory / name).is_file():
            kept[name] = (directory / name).read_bytes()
    if previous.exists():  # An interrupted re-run: the directory in place is its unfinished attempt.
        shutil.rmtree(directory)
    else:
        os.rename(directory, previous)
    for name, content in kept.items():
        directory.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def drop_previous(directory: Path) -> None:
    """Remove what `clear_stage` set aside; its successor is complete."""
    shutil.rmtree(directory.with_name(f".{directory.name}.previous"), ignore_errors=True)


def _name_in(config: Path) -> Any:
    """`name` of a written config; None where it can't be read."""
    import yaml

    if not config.is_file():
        return None
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return found.get("name") if isinstance(found, dict) else None

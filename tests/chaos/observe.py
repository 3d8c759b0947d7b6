"""A run seen from outside: what it says and when, what its processes are asked, its steps, what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from actors.cluster.trace import BEGINNINGS
from tests.chaos.cells import Call, kind_of
from tests.chaos.nodes import raylet_of
from tests.whole_runs.runs import ENVIRONMENT, processes_with

SHM = Path("/dev/shm")
TORCHS = "torchinductor_"
"""Torch's cache of compiled code, an empty directory that its import makes."""


class Tail:
    """The JSON lines of a file that grows; one that was cut is read anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._read = 0

    def rows(self) -> list[dict[str, Any]]:
        """Lines so far, those that are whole."""
        with contextlib.suppress(OSError):
            size = self.path.stat().st_size
            if size < self._read:
                self._rows, self._read = [], 0
            if size > self._read:
                with self.path.open("rb") as file:
                    file.seek(self._read)
                    new = file.read()
                whole = new[: new.rfind(b"\n") + 1]
                self._read += len(whole)
                self._rows += [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        return self._rows


class Calls:
    """What one process is asked, of all its lives."""

    def __init__(self, run: Path, who: str) -> None:
        trace = run / "logs" / "trace"
        self.begun, self.done = Tail(trace / f"{who}.begun"), Tail(trace / f"{who}.jsonl")

    def inside(self, call: Call, after: float) -> dict[str, Any] | None:
        """The call that it is in, if it is such a one and began after a time (epoch)."""
        begun = self.begun.rows()
        if not begun or (begun[-1]["method"], begun[-1]["phase"]) != call or begun[-1]["start"] < after:
            return None
        done = self.done.rows()
        return None if done and done[-1]["start"] == begun[-1]["start"] else begun[-1]

    def seconds(self, call: Call) -> list[float]:
        """How long each such call took."""
        rows = self.done.rows()
        return [row["end"] - row["start"] for row in rows if (row["method"], row["phase"]) == call]

    def loading(self, after: float) -> float:
        """Seconds of building and loading since a time (epoch)."""
        rows = [row for row in self.done.rows() if row["start"] >= after]
        return sum(row["end"] - row["start"] for row in rows if row["phase"] in ("load", "restore"))


class Lengths:
    """How long calls take in an undisturbed run: the quick ones of them, so that a moment within is there."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._known: dict[tuple[str, Call], float] = {}

    def of(self, who: str, call: Call) -> float:
        """Seconds; 0 for a call that was not seen."""
        if (who, call) not in self._known:
            seconds = Calls(self._run, who).seconds(call) or [0.0]
            quick = min(seconds) if len(seconds) < 4 else statistics.quantiles(seconds, n=4)[0]
            self._known[who, call] = quick
        return self._known[who, call]


class Life:
    """A run under way, whose processes can be told from all others: they inherit a variable."""

    def __init__(self, command: list[str], directory: Path, run: Path, temporary: Path) -> None:
        self.run, self.temporary, self.began = run, temporary, time.time()
        self._shm = {path.name for path in SHM.iterdir()}
        self.mark = f"RAYLIGN_CHAOS_{uuid.uuid4().hex}"
        variables = {self.mark: "1", BEGINNINGS: "1", "TMPDIR": str(temporary)}
        self.process = subprocess.Popen(
            command, cwd=directory, env=ENVIRONMENT | variables, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.said: list[tuple[float, str]] = []
        """Lines with their times (epoch)."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._calls: dict[str, Calls] = {}

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append((time.time(), line.rstrip()))

    def hear_out(self) -> None:
        """Wait for the last lines of a run that has ended."""
        self._reader.join(5)

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def calls(self, who: str) -> Calls:
        if who not in self._calls:
            self._calls[who] = Calls(self.run, who)
        return self._calls[who]

    def lives(self, who: str) -> list[int]:
        """Process ids of a process's lives in this life of the run, by its log."""
        since = int(self.began)
        return [pid for pid, at in beginnings(self.run, who) if at >= since]

    def pid(self, role: str) -> int | None:
        """Process id of a role, None before it is there."""
        if role == "driver":
            return self.process.pid
        if role in ("raylet", "gcs"):
            return self._rays({"raylet": "/raylet/raylet ", "gcs": "/gcs_server "}[role])
        if role == "node":
            engine = self.pid("rollout-1")
            return None if engine is None else raylet_of(engine)
        return (self.lives(role) or [None])[-1]

    def _rays(self, part: str) -> int | None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if part in " ".join(child.cmdline()) + " ":
                        return child.pid
        return None

    def ours(self) -> list[psutil.Process]:
        """Processes of the run that are there."""
        return processes_with(self.mark)

    def left(self, seconds: float = 5.0) -> dict[str, list[str]]:
        """What an ended run has left: processes that are there after some seconds, files in /dev/shm that
        nobody holds any more, and what is in its directory for temporary files."""
        deadline = time.monotonic() + seconds
        while (processes := self.ours()) and time.monotonic() < deadline:
            time.sleep(0.1)
        names = {path.name for path in SHM.iterdir()} - self._shm
        orphans = sorted(names - held()) if names else []
        files = sorted(one.name for one in self.temporary.iterdir() if not one.name.startswith(TORCHS))
        return {
            "processes": [f"{one.pid} {' '.join(cmdline(one))[:60]}" for one in processes],
            "/dev/shm": orphans, "/tmp": files,
        }  # fmt: skip

    def end(self) -> None:
        """Kill the run with all that it started, and wait for it."""
        for _ in range(20):
            found = self.ours()
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not found:
                break
            time.sleep(0.1)
        self.process.wait(30)
        self.hear_out()


def beginnings(run: Path, who: str) -> list[tuple[int, float]]:
    """Process id and time (epoch) of each life of a process, by its log."""
    log = run / "logs" / f"{who}.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    found = re.findall(rf"^--- {who} pid (\d+) ([\d-]+ [\d:]+)", text, re.MULTILINE)
    return [(int(pid), time.mktime(time.strptime(at, "%Y-%m-%d %H:%M:%S"))) for pid, at in found]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def held() -> set[str]:
    """Names in /dev/shm that some process has open or mapped."""
    found: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            found |= set(re.findall(r"/dev/shm/(\S+)", Path(f"/proc/{process.pid}/maps").read_text()))
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(link)
                    if target.startswith("/dev/shm/"):
                        found.add(target.removeprefix("/dev/shm/").removesuffix(" (deleted)"))
    return found


def steps(rows: list[Mapping[str, Any]]) -> int:
    """The last logged step, 0 without any."""
    return int(rows[-1]["step"]) if rows else 0


def send(pid: int, way: str) -> None:
    """Kill or stop a process."""
    os.kill(pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[way])


def alive(pid: int) -> bool:
    """The process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_about(line: str, role: str) -> bool:
    """A line of a run tells the loss of a role's process."""
    names = {"gcs": "GCS", "driver": "driver", "raylet": "raylet"}
    name = names.get(role, kind_of(role))
    return (
        name in line
        and re.search(r"replaced|failed|died|has ended|was stopped|no answer|lost|started anew|recover", line)
        is not None
    )

"""A run goes on, and ends with its own exit code, when nobody can read any more what it says."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.monitoring.lasting_output import LastingOutput

RUN = """
import signal, sys, time
from pathlib import Path
from pipeline.execution.stop import StopRequests
from pipeline.monitoring.progress import Progress
with Progress() as progress, StopRequests(progress.note) as stop:
    progress.stage("sft", total=2)
    stop.begin("stopping after step 1, then saving")
    progress.note("ready")
    while not stop.asked():
        time.sleep(0.01)
    for step in range(200):
        progress.step(1, {"loss": 1.0})
        progress.note("saved " * 100)
    progress.done("stopped")
    Path(sys.argv[1]).write_text("saved")
sys.exit(75)
"""


def until(there: Path) -> None:
    deadline = time.monotonic() + 30
    while not there.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_closed_terminal_asks_for_a_stop_and_breaks_nothing(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", RUN, str(tmp_path / "saved")])
    while b"ready" not in os.read(terminal, 4096):
        pass
    os.close(terminal)  # Its session's leader gets SIGHUP, and EIO at every write from now on.
    until(tmp_path / "saved")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75


def test_a_reader_that_took_the_same_interrupt_breaks_nothing(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "saved")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stderr is not None
    while "ready" not in run.stdout.readline():
        pass
    run.stdout.close()
    run.terminate()
    assert run.stderr.read() == ""
    assert run.wait(30) == 75
    assert (tmp_path / "saved").is_file()


def test_a_full_disk_is_no_reader_that_went_away() -> None:
    with open("/dev/full", "w") as full:
        out = LastingOutput(full)
        out.write("text")
        with pytest.raises(OSError, match="No space left"):
            out.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for `close`, which would raise it too

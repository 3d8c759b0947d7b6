"""Looks at real processes with a pulse: what they do, that they are stopped, and what they have started."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from actors.cluster.hung import Look
from actors.cluster.process_looks import look_at
from actors.cluster.pulse import machine

WORKING = """
import subprocess, sys, time
from pathlib import Path
from actors.cluster import pulse
pulse.PULSE_S = 0.05
entered = [0]
pulse.count_collectives(lambda: {"0-1": entered[0]})
beat = pulse.Pulse(Path(sys.argv[1]))
child = subprocess.Popen(["sleep", "100"])
with beat.during("updates.update", 7):
    entered[0] += 3
    print(child.pid, pulse.machine(), flush=True)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        pass
    time.sleep(100)
"""


@pytest.fixture
def working(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """A process with a pulse, a child of it, and the pulse's file."""
    path = tmp_path / "pulse"
    process = subprocess.Popen([sys.executable, "-c", WORKING, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child, where = process.stdout.readline().split(maxsplit=1)
    assert where.strip() == machine()
    yield process, int(child), path
    for pid in (int(child), process.pid):
        psutil.Process(pid).kill()
    process.wait()


def seen(pid: int, path: Path, true: Callable[[Look], bool]) -> Look:
    """The first look for which it is true."""
    until = time.monotonic() + 20
    while True:
        look = look_at({0: (pid, str(path))})[0]
        if true(look):
            return look
        assert time.monotonic() < until, look
        time.sleep(0.02)


def test_a_look_shows_what_a_process_does_and_whether_it_or_its_child_is_stopped(
    working: tuple[subprocess.Popen[str], int, Path],
) -> None:
    process, child, path = working
    pid = process.pid
    look = seen(pid, path, lambda one: one.cpu_s > 0.5)
    assert (look.doing, look.entered, look.stopped) == ("updates.update, step 7", {"0-1": 3}, False)
    assert seen(pid, path, lambda one: one.beats > look.beats).beats > 1
    for stopped in (pid, child):
        psutil.Process(stopped).suspend()
        seen(pid, path, lambda one: one.stopped)
        psutil.Process(stopped).resume()
        seen(pid, path, lambda one: not one.stopped)


def test_a_process_that_is_gone_is_left_out_and_one_without_a_pulse_is_seen(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    sleeper = subprocess.Popen(["sleep", "100"])
    (tmp_path / "cut").write_text('{"beats": 3, "entered": {"0-1": ')
    looks = look_at({0: (ended.pid, "none"), 1: (sleeper.pid, str(tmp_path / "cut"))})
    sleeper.kill()
    sleeper.wait()
    assert list(looks) == [1]
    assert (looks[1].beats, looks[1].entered, looks[1].stopped) == (0, {}, False)

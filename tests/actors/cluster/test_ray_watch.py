"""The watch over Ray's processes, with processes that do nothing in their place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from actors.cluster import ray_watch
from actors.cluster.ray_watch import RayWatch
from actors.errors import AGAIN


@pytest.fixture
def sleepers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    monkeypatch.setattr(ray_watch, "LOOK_S", 0.05)
    monkeypatch.setattr(ray_watch, "STOPPED_S", 1.0)
    found = {name: subprocess.Popen(["sleep", "100"]) for name in ("the raylet", "the GCS")}
    yield found
    for process in found.values():
        process.kill()
        process.wait()


def watch(sleepers: dict[str, subprocess.Popen[bytes]]) -> RayWatch:
    return RayWatch({name: process.pid for name, process in sleepers.items()})


def soon(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (signal.SIGKILL, "the GCS has died (killed, crashed, or out of memory)"),
        (signal.SIGSTOP, "the GCS was stopped (SIGSTOP) for 1 s"),
    ],
)
def test_a_process_that_is_lost_is_named_and_takes_the_others_along(
    sleepers: dict[str, subprocess.Popen[bytes]],
    sent: signal.Signals,
    reason: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    watching = watch(sleepers)
    sleepers["the GCS"].send_signal(sent)
    soon(lambda: watching.lost is not None)
    assert watching.lost == reason
    assert all(process.wait(20) == -signal.SIGKILL for process in sleepers.values())
    watching.end()
    watching.unwound()
    assert f"ray: {reason}; the run ends" in capfd.readouterr().err


def test_a_process_that_goes_on_in_time_or_ends_with_the_run_is_not_lost(
    sleepers: dict[str, subprocess.Popen[bytes]],
) -> None:
    watching = watch(sleepers)
    for _ in range(3):
        sleepers["the GCS"].send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        sleepers["the GCS"].send_signal(signal.SIGCONT)
        time.sleep(0.2)
    watching.end()
    sleepers["the GCS"].kill()
    time.sleep(0.3)
    assert watching.lost is None
    assert sleepers["the raylet"].poll() is None


def test_processes_that_this_one_has_done_with_may_end(
    sleepers: dict[str, subprocess.Popen[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    watching = RayWatch({name: process.pid for name, process in sleepers.items()}, lambda: False)
    sleepers["the GCS"].kill()
    watching._thread.join(20)
    assert not watching._thread.is_alive()
    assert watching.lost is None
    assert sleepers["the raylet"].poll() is None
    assert capfd.readouterr().err == ""


@pytest.mark.ray
def test_a_program_may_call_rays_own_shutdown() -> None:
    script = (
        "import time, ray\n"
        "from actors.cluster import ray_watch, start_ray\n"
        "ray_watch.UNWIND_S = 0.2\n"
        "start_ray(num_cpus=1)\n"
        "ray.shutdown()\n"
        "time.sleep(2)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_driver_that_does_not_come_back_is_ended() -> None:
    script = (
        "import sys, time\n"
        "from actors.cluster import ray_watch\n"
        "ray_watch.UNWIND_S = 0.2\n"
        "watching = ray_watch.RayWatch({'the raylet': int(sys.argv[1])})\n"
        "time.sleep(100)\n"
    )
    sleeper = subprocess.Popen(["sleep", "100"])
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(sleeper.pid)], stderr=subprocess.PIPE, text=True
    )
    time.sleep(1)
    os.kill(sleeper.pid, signal.SIGKILL)
    sleeper.wait()
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert "the raylet has died" in said
    assert AGAIN.capitalize() in said

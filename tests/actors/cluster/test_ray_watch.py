"""The watch over Ray's processes, with processes that do nothing in their place."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from actors.cluster import ray_watch
from actors.cluster.ray_watch import Probe, RayWatch
from actors.errors import AGAIN
from tests.pipeline.jobs.heads import Head


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


def test_what_others_own_is_named_and_not_killed(
    sleepers: dict[str, subprocess.Popen[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    pids = {name: process.pid for name, process in sleepers.items()}
    watching = RayWatch(pids, own=False)
    sleepers["the raylet"].send_signal(signal.SIGSTOP)
    soon(lambda: watching.lost is not None)
    time.sleep(0.2)
    assert all(process.poll() is None for process in sleepers.values())
    watching.end()
    watching.unwound()
    assert "ray: the raylet was stopped (SIGSTOP) for 1 s; the run ends" in capfd.readouterr().err


def test_what_gives_no_answer_for_some_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_watch, "LOOK_S", 0.02)
    monkeypatch.setattr(ray_watch, "ASK_S", 0.02)
    monkeypatch.setattr(ray_watch, "SILENT_S", 1.0)
    there = [True]
    watching = RayWatch({}, probes={"the GCS at head:6379": Probe(lambda: there[0])}, own=False)
    time.sleep(1.5)
    assert watching.lost is None
    there[0] = False
    soon(lambda: watching.lost is not None)
    assert watching.lost == "the GCS at head:6379 has not answered for 1 s"
    watching.end()
    watching.unwound()


WAITING = """
import sys, time, ray
from actors.cluster import ray_watch, start_ray
ray_watch.STOPPED_S, ray_watch.ASK_S, ray_watch.SILENT_S, ray_watch.UNWIND_BESIDE_S = 1, 0.2, 8, 1
start_ray(sys.argv[1])
print("joined", flush=True)
while True:
    ray.put(1)
    time.sleep(0.1)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_in_a_cluster_of_others_says_what_it_lost_and_ends() -> None:
    short = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))  # of a path that Ray's sockets fit below
    head = Head(short, {})
    try:
        head.start()
        assert head.process is not None
        family = psutil.Process(head.process.pid).children(recursive=True)
        address = f"127.0.0.1:{head.gcs_port}"
        for program, reason in (
            ("raylet", r"ray: the raylet of this machine was stopped \(SIGSTOP\) for 1 s; the run ends"),
            ("gcs_server", rf"ray: the GCS at [\d.]+:{head.gcs_port} has not answered for 8 s; the run ends"),
        ):
            (part,) = [one for one in family if one.name() == program]
            driver = subprocess.Popen(
                [sys.executable, "-c", WAITING, address],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=head.environment,
            )  # fmt: skip
            assert driver.stdout is not None
            assert driver.stdout.readline() == "joined\n"
            part.suspend()
            _, said = driver.communicate(timeout=60)
            part.resume()
            assert driver.returncode == 1, said
            assert re.search(reason, said), said
            assert part.is_running()
    finally:
        head.close()
        shutil.rmtree(short)


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

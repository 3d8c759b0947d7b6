"""What runs leave on a machine: nothing in the directory for temporary files, no process, no open door."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.cluster.environment import CORE_APART
from tests.whole_runs import runs
from tests.whole_runs.runs import TINY_MOE, command_of, has_done, start, when

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

NOTHING: list[Path] = []
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "grpc_proxy")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The runs' directory for temporary files, with a path that sockets fit below."""
    path = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    (path / "ray").mkdir()
    (path / "ray" / "session_latest").symlink_to(path / "session_of_somebody")
    monkeypatch.setattr(runs, "ENVIRONMENT", runs.ENVIRONMENT | {"TMPDIR": str(path)})
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    yield path
    shutil.rmtree(path)


def left_in(temporary: Path) -> list[Path]:
    """What is there besides Ray's usual directory, in which somebody else's link is as it was."""
    assert os.readlink(temporary / "ray" / "session_latest") == str(temporary / "session_of_somebody")
    assert len(list((temporary / "ray").iterdir())) == 1
    return [path for path in temporary.iterdir() if path.name != "ray"]


def config(output: Path, **changes: Any) -> dict[str, Any]:
    """SFT on two ranks."""
    sft = {
        "data": {"source": "builtin:arithmetic", "max_rows": 32},
        "batch_size": 8,
        "max_steps": 3,
        "max_length": 64,
    }
    return {
        "name": output.name,
        "output_dir": str(output),
        "model": {"base": str(TINY_MOE), "lora": {"r": 4}},
        "stages": {"sft": sft},
        "roles": {"policy": {"workers": 2}, "rollout": {"workers": 1}},
        **changes,
    }


def online(output: Path, reward: str) -> dict[str, Any]:
    """GRPO, with two ranks that meet, and one engine that gets weights."""
    whole = config(output)
    grpo = whole["stages"].pop("sft") | {"rewards": [reward], "num_generations": 4, "save_steps": 2}
    grpo["data"] = grpo["data"] | {"split": "prompts"}
    whole["stages"] = {"grpo": grpo | {"max_completion_length": 8, "batch_size": 16}}
    return whole


def listening(pid: int) -> dict[str, str]:
    """Addresses at which a process and its descendants take connections, and whose they are."""
    found = {}
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    for process in family:
        try:
            open_ones = process.net_connections("tcp")
            name = " ".join(process.cmdline())
        except psutil.Error:  # it has ended
            continue
        found |= {f"{c.laddr.ip}:{c.laddr.port}": name for c in open_ones if c.status == "LISTEN"}
    return found


def loopback(address: str) -> bool:
    ip: Any = ipaddress.ip_address(address.rpartition(":")[0])
    return bool((getattr(ip, "ipv4_mapped", None) or ip).is_loopback)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "where",
    [
        "without a home, behind a proxy",
        pytest.param("with a long path, a core apart", marks=pytest.mark.slow),
    ],
)
def test_a_run_listens_on_loopback_only_and_leaves_nothing(
    tmp_path: Path, temporary: Path, where: str
) -> None:
    whole = online(tmp_path / "run", "exact_match")
    variables = {"HOME": "/proc/nohome"} | dict.fromkeys(PROXIES, "http://127.0.0.1:9")
    if "long" in where:  # the batch system's directory of a job
        long = tmp_path / ("scratch_of_a_batch_system_" * 3) / "job_1234567"
        long.mkdir(parents=True)
        variables = {"TMPDIR": str(long), "RAY_TMPDIR": str(temporary), CORE_APART: "1"}
        whole["ray"] = {"fast_start": False}
    process = start(command_of(tmp_path, whole), tmp_path, **variables)
    seen: dict[str, str] = {}
    while process.poll() is None:
        seen |= listening(process.pid)
        time.sleep(0.1)
    assert process.stdout is not None
    said = process.stdout.read()
    assert process.returncode == 0, said
    assert {address: name for address, name in seen.items() if not loopback(address)} == {}
    names = " ".join(seen.values())
    assert all(part in names for part in ("gcs_server", "raylet", "pipeline run", "ray::Worker"))
    assert len(seen) > 6  # Ray's own, the meeting of two ranks, gloo's, the channel of the engine
    assert "long" not in where or list(long.iterdir()) == NOTHING
    assert left_in(temporary) == NOTHING
    assert not (tmp_path / "run" / "logs" / "ray").exists()


def test_a_failed_run_keeps_rays_logs_and_says_where(tmp_path: Path, temporary: Path) -> None:
    whole = config(tmp_path / "run", limits={"max_restarts": 0})
    process = start(command_of(tmp_path, whole), tmp_path)
    run = tmp_path / "run"
    when(process, has_done(run, "policy-1", "build", 1))
    os.kill(runs.pid_of(run, "policy-1"), signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1, said
    kept = re.search(r"^Ray's own logs of this run are kept in (.*)$", said, re.MULTILINE)
    assert kept is not None
    assert Path(kept[1]) == run / "logs" / "ray"
    assert (run / "logs" / "ray" / "raylet.out").stat().st_size > 0
    assert left_in(temporary) == NOTHING


def test_a_run_that_loses_a_part_of_ray_says_so_and_ends(tmp_path: Path, temporary: Path) -> None:
    """Ray itself may end a driver that waits for a raylet at that moment: then only the name is said."""
    for attempt in range(3):
        run = tmp_path / f"run{attempt}"
        whole = config(run)
        whole["stages"]["sft"]["max_steps"] = 10_000
        process = start(command_of(tmp_path, whole), tmp_path)
        when(process, (run / "sft" / "metrics.jsonl").is_file)
        family = psutil.Process(process.pid).children(recursive=True)
        (lost,) = [one for one in family if titled(one, "/gcs_server ")]
        lost.kill()
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 1, said
        assert "ray: the GCS has died" in said
        if "failed:" in said:
            break
    assert "failed: ray failed in phase 'run': the GCS has died" in said
    assert (run / "logs" / "ray" / "gcs_server.out").is_file()
    assert left_in(temporary) == NOTHING


def test_a_stopped_run_leaves_nothing_and_keeps_no_logs_of_ray(tmp_path: Path, temporary: Path) -> None:
    process = start(command_of(tmp_path, config(tmp_path / "run")), tmp_path)
    when(process, has_done(tmp_path / "run", "policy-1", "build", 1))
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert left_in(temporary) == NOTHING
    assert not (tmp_path / "run" / "logs" / "ray").exists()


def test_what_a_killed_run_left_goes_with_the_next_run(tmp_path: Path, temporary: Path) -> None:
    command = command_of(tmp_path, config(tmp_path / "run"))
    runs.kill_when(command, tmp_path, has_done(tmp_path / "run", "policy-1", "build", 1))
    assert left_in(temporary) != NOTHING
    runs.complete(command, tmp_path)
    assert left_in(temporary) == NOTHING


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_run_that_ends_while_its_workers_start(
    tmp_path: Path, temporary: Path, fast: bool, sent: signal.Signals
) -> None:
    whole = config(tmp_path / "run") | {"ray": {"fast_start": fast}}
    process = start(command_of(tmp_path, whole), tmp_path)
    seen: set[psutil.Process] = set()
    when(process, lambda: has_worker(process.pid, seen))
    for _ in range(2):  # the second interrupt doesn't wait for anything
        process.send_signal(sent)
        time.sleep(0.3)
    said, _ = process.communicate(timeout=300)
    assert process.returncode in (75, 130, -signal.SIGKILL), said
    deadline = time.monotonic() + 5
    while (outliving := [one for one in seen if runs_still(one)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert outliving == []


def has_worker(driver: int, seen: set[psutil.Process]) -> bool:
    """A worker was started, and is no rank yet: forked by the server, or one of Ray's own. All descendants
    are added to `seen`."""
    seen.update(psutil.Process(driver).children(recursive=True))
    servers = [one.pid for one in seen if titled(one, "fork_server.py")]
    return any(started_by(one, servers) if servers else titled(one, "default_worker.py") for one in seen)


def started_by(process: psutil.Process, parents: list[int]) -> bool:
    """It still runs, and one of these started it."""
    try:
        return process.ppid() in parents and runs_still(process)
    except psutil.NoSuchProcess:
        return False


def runs_still(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def titled(process: psutil.Process, *parts: str) -> bool:
    """Its command line has one of these in it."""
    try:
        return any(part in " ".join(process.cmdline()) for part in parts)
    except psutil.Error:
        return False

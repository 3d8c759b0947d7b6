"""Imports once, then processes from it: as they were asked for, one at a time, and none that outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.cluster.fast_start import forked_worker
from actors.cluster.fast_start.fork_server import ForkServer

WORKER = """
import json, os, sys
print("on its standard output")
facts = {
    "pid": os.getpid(), "parent": os.getppid(), "arguments": sys.argv, "directory": os.getcwd(),
    "path": sys.path[0], "variable": os.environ.get("ASKED_BY"), "name": __name__,
    "imported": "wave" in sys.modules, "own": os.environ.get("SERVERS_OWN"),
}
with open(sys.argv[1] + ".part", "w") as file:
    json.dump(facts, file)
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "scripts" / "worker.py"
    path.parent.mkdir()
    path.write_text(WORKER)
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    server = ForkServer(["wave"], {"SERVERS_OWN": "1"}, tmp_path / "server.log")
    yield server
    server.stop()


def ask(address: str, worker: Path, out: Path) -> tuple[dict[str, Any], subprocess.Popen[str]]:
    """Start a worker as Ray does; what it wrote, and the process that was started."""
    asking = subprocess.Popen(
        [sys.executable, forked_worker.__file__, address, str(worker), str(out), "--flag"],
        env=os.environ | {"ASKED_BY": "ray"},
        cwd=worker.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    asking.wait(20)
    wait_for(out.is_file)
    return json.loads(out.read_text()), asking


def wait_for(there: Any) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_forked_worker_is_as_it_was_asked_for(server: ForkServer, worker: Path, tmp_path: Path) -> None:
    facts, asking = ask(server.address, worker, tmp_path / "out")
    assert facts["parent"] == server.pid
    assert facts["imported"]
    assert facts["name"] == "__main__"
    assert facts["arguments"] == [str(worker), str(tmp_path / "out"), "--flag"]
    assert facts["path"] == facts["directory"] == str(worker.parent)
    assert facts["variable"] == "ray"
    assert facts["own"] is None
    assert asking.communicate()[0] == "on its standard output\n"
    again, _ = ask(server.address, worker, tmp_path / "again")
    assert again["pid"] != facts["pid"]


def test_without_a_server_the_worker_starts_by_itself(worker: Path, tmp_path: Path) -> None:
    facts, asking = ask(str(tmp_path / "nowhere"), worker, tmp_path / "out")
    assert facts["pid"] == asking.pid
    assert not facts["imported"]
    assert facts["arguments"] == [str(worker), str(tmp_path / "out"), "--flag"]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("broken", "ImportError: broken on purpose"),
        ("threaded", "2 threads after the imports: a fork would lose all but one"),
    ],
)
def test_a_server_that_cannot_fork_says_why_and_leaves_it_to_the_workers(
    module: str, says: str, worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('broken on purpose')")
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer([module], {}, tmp_path / "server.log")
    facts, asking = ask(server.address, worker, tmp_path / "out")
    server.stop()
    assert facts["pid"] == asking.pid
    assert says in (tmp_path / "server.log").read_text()


def test_a_strangers_word_ends_neither_the_server_nor_the_next_worker(
    server: ForkServer, worker: Path, tmp_path: Path
) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(server.address)
        stranger.sendall(b"hello")
    assert ask(server.address, worker, tmp_path / "out")[0]["parent"] == server.pid


def test_only_its_own_user_can_ask_it(server: ForkServer) -> None:
    assert Path(server.address).parent.stat().st_mode & 0o077 == 0


def test_a_long_directory_for_temporary_files_is_no_obstacle(
    worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    server = ForkServer([], {}, tmp_path / "server.log")
    assert ask(server.address, worker, tmp_path / "out")[0]["parent"] == server.pid
    server.stop()
    assert not Path(server.address).parent.exists()


def test_a_server_ends_with_its_driver(tmp_path: Path, repository: Path) -> None:
    driver = (
        "import sys, time; from pathlib import Path\n"
        "from actors.cluster.fast_start.fork_server import ForkServer\n"
        "server = ForkServer([], {}, Path(sys.argv[1])); print(server.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", driver, str(tmp_path / "server.log")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=repository, env=os.environ | {"TMPDIR": str(tmp_path)}
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait_for(lambda: "fork-server pid" in (tmp_path / "server.log").read_text())
        assert alive(pid)
        os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))

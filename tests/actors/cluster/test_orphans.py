"""The local cluster of a driver that is killed with -9 goes away by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

DRIVER = """
import sys
from pathlib import Path
from actors.cluster.connection import start_ray
from actors.cluster.fast_start import ForkServer
from actors.cluster.worker_group import WorkerGroup
from actors.cluster.spec import LimitsSpec, RoleSpec

def main():
    logs = Path(sys.argv[1])
    server = ForkServer(["numpy"], {}, logs / "fork-server.log") if sys.argv[2] == "forked" else None
    start_ray(num_cpus=2, fork_server=server)
    group = WorkerGroup("policy", RoleSpec(workers=2), LimitsSpec(), logs).start().ready()
    pids = group.pids()
    group.build("duties:Duty", distributed=True).result()
    busy = group.submit("spin", 120.0)
    print("PIDS", *pids, flush=True)
    busy.result()

main()
"""


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def holds_cpu(pid: int) -> bool:
    """True while the process runs (a zombie doesn't)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("workers", ["ray's own", "forked"])
def test_no_actor_and_no_ray_outlives_a_killed_driver(workers: str, tmp_path: Path, repository: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    paths = os.pathsep.join([str(repository), str(Path(__file__).parents[1])])
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "logs"), workers]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        assert driver.stdout is not None
        actors = [int(pid) for pid in driver.stdout.readline().split()[1:]]
        assert len(actors) == 2
        head_and_node = children(driver.pid)
        assert len(head_and_node) >= 2
        os.kill(driver.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        left = [*actors, *head_and_node]
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = [pid for pid in left if holds_cpu(pid)]
    assert left == []

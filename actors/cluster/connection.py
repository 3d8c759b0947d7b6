"""The Ray cluster of a run: started here or connected to, and refused when it is too small."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.cluster.environment import import_root, ray_environment
from actors.cluster.fast_start import ForkServer, lean_cluster
from actors.cluster.joined_cluster import JoinedCluster
from actors.cluster.local_cluster import LocalCluster
from actors.cluster.ray_private import mute_raylet, own_sigterm, unmute_raylet, workers_import_from
from actors.cluster.room import shortages
from actors.cluster.spec import RoleSpec
from actors.errors import RunFailure, UserError

OBJECT_STORE_BYTES = 512 * 2**20
"""Object store of a local cluster. Batches are small and what doesn't fit is spilled to disk; Ray's own
choice, 30 % of the memory, makes it warn wherever /dev/shm is smaller (64 MiB in a plain container)."""
PLAIN_START = "plain start (ray.fast_start: false)"

_cluster: LocalCluster | JoinedCluster | None = None
"""The cluster that this process has started or joined."""


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that this process is connected to."""

    local: bool
    """Started by this process, and gone with it."""
    address: str
    resources: Mapping[str, float]
    """Totals over all nodes: CPU, GPU, custom."""
    seconds: float
    """Time to start or to connect."""
    how: str
    """One line for the log: connected, started fast or plain, and why not faster."""


def import_ray() -> None:
    """Import Ray, half of the time of a start, with the environment that it reads then."""
    os.environ.update({name: value for name, value in ray_environment().items() if name not in os.environ})
    _make_importable()
    importlib.import_module("ray")


def start_ray(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    object_store_memory: int | None = None,
    fast_start: bool = True,
    fork_server: ForkServer | None = None,
    keep_logs: Path | None = None,
) -> Cluster:
    """Connect to the cluster at `address` (or of this Ray job), or start one that ends with this process.

    Takes about a second, most of it waiting: call it from a thread and read data meanwhile. When the process
    is killed with -9, the kernel takes the local cluster down with it: head and node at once, actors within
    4 s. `fast_start` and `fork_server` are for a local cluster: start only the processes of Ray's that a run
    needs (`actors.cluster.fast_start`); where its workers come from. `keep_logs`: where Ray's logs of a
    local cluster are moved to when the run fails.

    Raises:
        UserError: there is no cluster at `address`, its Ray or Python version differs, or there is no place
            for a local cluster's files.
        RunFailure: a local cluster does not come up, as on a machine that is busy with other work.
    """
    import_ray()
    by, address = _named(address)
    local = address in (None, "local")
    import ray

    began = time.monotonic()
    how = "was connected already"
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        quiet |= workers_import_from(import_root())
        with own_sigterm():
            if local:
                settings = quiet | {
                    "num_cpus": num_cpus if num_cpus is not None else local_resources()["CPU"],
                    "include_dashboard": False,
                    "object_store_memory": object_store_memory or OBJECT_STORE_BYTES,
                }
                how = _start_local(settings, fast_start, fork_server, keep_logs)
            else:
                _keep(JoinedCluster(str(address), by, quiet))
                how = f"connected to the cluster at {address}"
    mute_raylet()
    seconds, gcs_address = time.monotonic() - began, ray.get_runtime_context().gcs_address
    return Cluster(local, gcs_address, _totals(ray.cluster_resources()), seconds, f"ray: {how}")


def is_local(address: str | None) -> bool:
    """True where `start_ray` would start a local cluster: no address is given, and none is connected yet."""
    ray = sys.modules.get("ray")
    connected = ray is not None and ray.is_initialized()
    return not connected and _named(address)[1] in (None, "local")


def on_one_machine() -> bool:
    """True where all of the cluster is this machine, and stays so. Of one that was joined, nodes come and go:
    who uses the loopback interface there could not meet what is started on another node later."""
    if _cluster is not None:
        return isinstance(_cluster, LocalCluster)
    import ray

    return sum(node["Alive"] for node in ray.nodes()) == 1


def stop_ray(failed: bool = False) -> Path | None:
    """Disconnect; a cluster that `start_ray` started ends, and its files are removed.

    After a `failed` run Ray's logs of that cluster are kept; returns their directory.
    """
    global _cluster
    kept = None
    if "ray" in sys.modules:
        import ray

        cluster, _cluster = _cluster, None
        if cluster is not None:
            kept = cluster.end(failed)
        else:
            ray.shutdown()
        unmute_raylet()
    return kept


def ray_lost(now: bool = False) -> RunFailure | None:
    """The failure of a cluster that `start_ray` started or joined and that can't go on, which is behind
    whatever else fails then; None while all is well. It is known within 0.2 s; `now`: looks."""
    return _cluster.lost(now) if _cluster is not None else None


def check_cluster(roles: Mapping[str, RoleSpec], *, num_cpus: float | None = None) -> None:
    """Refuse roles that the cluster can't hold: the connected one, or else the one that would be started.

    Raises:
        UserError: with the sum per resource, and each role's part of it.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        where, nodes = "the cluster", [_totals(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    elif num_cpus is not None:
        where, nodes = "the local cluster (ray.num_cpus)", [local_resources() | {"CPU": num_cpus}]
    else:
        where, nodes = "this machine", [local_resources()]
    problems = shortages(roles, nodes, where)
    if problems:
        raise UserError(problems)


def local_resources() -> dict[str, float]:
    """CPU and GPU of this machine, as a local cluster would offer them; asks neither Ray nor torch."""
    cpus = float(len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cpus = max(1.0, min(cpus, int(limit) // int(period)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if visible is not None:
        gpus = len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return {"CPU": cpus, "GPU": float(gpus)}


def local_memory() -> int:
    """Bytes of this machine's memory and swap, or of what its container may take."""
    import psutil

    total = psutil.virtual_memory().total + psutil.swap_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    found = limit.read_text().strip() if limit.is_file() else "max"
    return total if found == "max" else min(total, int(found))


def _start_local(
    settings: Mapping[str, Any], fast: bool, fork_server: ForkServer | None, keep_logs: Path | None
) -> str:
    """Start a local cluster; how that was done."""
    starting = lean_cluster(fork_server) if fast else contextlib.nullcontext(PLAIN_START)
    cluster = LocalCluster(settings, starting, keep_logs)
    _keep(cluster)
    return cluster.how


def _keep(cluster: LocalCluster | JoinedCluster) -> None:
    global _cluster
    _cluster = cluster
    atexit.register(stop_ray)  # Of programs that don't; before Ray's own.


def _named(address: str | None) -> tuple[str, str | None]:
    """The key or the variable that names a cluster, and the address there; an empty variable names none."""
    if address:
        return "ray.address", address
    return "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "").strip() or None


def _make_importable() -> None:
    """Let the workers of a local cluster import what this process runs, installed or from a checkout."""
    root = import_root()
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, known)])


def _totals(resources: Mapping[str, float]) -> dict[str, float]:
    """Resources that a role can ask for: without Ray's own entries per node and per placement group."""
    own = ("node:", "object_store_memory", "memory", "bundle_group_")
    return {
        name: float(amount)
        for name, amount in resources.items()
        if not name.startswith(own) and "_group_" not in name
    }

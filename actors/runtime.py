"""What a role may use and how long it may take; and the Ray cluster that gives it.

Ray is imported inside the functions that need it: the configuration composes these specs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from actors.environment import ray_environment
from actors.errors import UserError
from actors.models.spec import Spec

OBJECT_STORE_BYTES = 512 * 2**20
"""Object store of a local cluster. Batches are small and what doesn't fit is spilled to disk; Ray's own
choice, 30 % of the memory, makes it warn wherever /dev/shm is smaller (64 MiB in a plain container)."""

Phase = Literal[
    "start", "load", "update", "evaluate", "logprobs", "generate", "save", "restore", "sync", "call", "stop"
]
"""What an actor is being asked to do; each has its deadline in `LimitsSpec`."""


class RoleSpec(Spec):
    """Processes and resources of one role (policy, reference, rollout, ...)."""

    workers: int = Field(default=1, ge=1)
    """Processes of this role: data-parallel ranks of a host, or engines of the rollout role."""
    cpus: float = Field(default=0.25, gt=0)
    """CPUs that Ray reserves for each process; a fraction lets roles share a core."""
    gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for each process; a fraction lets roles share a GPU."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources that each process asks for, e.g. `{"big-memory-node": 1}`."""
    threads: int = Field(default=1, ge=1)
    """Compute threads (OpenMP, torch) of each process. Not tied to `cpus`, which only reserves."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """How Ray lays the processes over nodes: together, or apart; `strict_` makes it a condition."""
    share: str | None = None
    """Be a view of that role's host (no processes, no second base in memory). Excludes the others."""

    @model_validator(mode="after")
    def _share_takes_nothing(self) -> Self:
        others = sorted(self.model_fields_set - {"share"})
        if self.share is not None and others:
            raise ValueError(
                f"share: {self.share} puts this role on the processes of {self.share}, so it can't set "
                f"{', '.join(others)}: set them on {self.share}, or leave share out"
            )
        return self


class LimitsSpec(Spec):
    """Deadlines in seconds. Past one, the run ends with the role, the rank and the phase's name."""

    start: float = Field(default=180, gt=0)
    """Process start and imports, and the rendezvous of a group's ranks."""
    load: float = Field(default=900, gt=0)
    """Loading a base or an adapter, starting an engine."""
    update: float = Field(default=900, gt=0)
    """One optimizer step over a global batch."""
    evaluate: float = Field(default=900, gt=0)
    """A loss over one evaluation batch."""
    logprobs: float = Field(default=900, gt=0)
    """Log-probabilities of one batch."""
    generate: float = Field(default=1800, gt=0)
    """Generation for one list of prompts."""
    save: float = Field(default=900, gt=0)
    """Writing an adapter, a model or a checkpoint."""
    restore: float = Field(default=900, gt=0)
    """Reading a checkpoint back."""
    sync: float = Field(default=600, gt=0)
    """One weight sync, from gathering to verification."""
    call: float = Field(default=120, gt=0)
    """Any other call (describe, digest, counters)."""
    stop: float = Field(default=10, gt=0)
    """A clean end of an actor, before it is killed."""

    def of(self, phase: Phase) -> float:
        """Deadline of `phase` in seconds."""
        return float(getattr(self, phase))


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


def start_ray(
    address: str | None = None, *, num_cpus: float | None = None, object_store_memory: int | None = None
) -> Cluster:
    """Connect to the cluster at `address` (or of this Ray job), or start one that ends with this process.

    Takes 3 to 4 s, most of it waiting: call it from a thread and read data meanwhile. When the process is
    killed with -9, the kernel and Ray take the local cluster down with it.

    Raises:
        UserError: there is no cluster at `address`, or its Ray or Python version differs.
    """
    os.environ.update({name: value for name, value in ray_environment().items() if name not in os.environ})
    _make_importable()
    import ray

    began = time.monotonic()
    address = address or os.environ.get("RAY_ADDRESS")
    local = address in (None, "local")
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if local:
            ray.init(
                address="local",
                num_cpus=num_cpus if num_cpus is not None else local_resources()["CPU"],
                include_dashboard=False,
                object_store_memory=object_store_memory or OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            _connect(str(address), quiet)
    _mute_raylet()
    seconds = time.monotonic() - began
    return Cluster(local, ray.get_runtime_context().gcs_address, _totals(ray.cluster_resources()), seconds)


def stop_ray() -> None:
    """Disconnect; a cluster that `start_ray` started ends."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


def check_cluster(roles: Mapping[str, RoleSpec], *, num_cpus: float | None = None) -> None:
    """Refuse roles that the cluster can't hold: the connected one, or else the one that would be started.

    Raises:
        UserError: with the sum per resource, and each role's part of it.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        nodes = [_totals(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    else:
        nodes = [local_resources() | ({"CPU": num_cpus} if num_cpus is not None else {})]
    problems = shortages(roles, nodes)
    if problems:
        raise UserError(problems)


def shortages(roles: Mapping[str, RoleSpec], nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """What `nodes` lack to hold `roles`, one line each: sums over the cluster, then single processes."""
    own = {name: role for name, role in roles.items() if role.share is None}
    problems = []
    for resource in sorted({resource for role in own.values() for resource in bundle(role)}):
        parts = {name: role.workers * bundle(role).get(resource, 0.0) for name, role in own.items()}
        needed, there = sum(parts.values()), sum(node.get(resource, 0.0) for node in nodes)
        if needed > there + 1e-6:
            terms = " + ".join(
                f"{name} {own[name].workers} x {bundle(own[name])[resource]:g}"
                for name, part in parts.items()
                if part
            )
            problems.append(
                f"roles: {needed:g} {resource} asked for ({terms}), the cluster has {there:g}; "
                "lower workers or what each one asks for, or use a larger cluster (ray.address)"
            )
    if problems:
        return problems
    for name, role in own.items():
        if not any(all(node.get(r, 0.0) + 1e-6 >= v for r, v in bundle(role).items()) for node in nodes):
            asked = ", ".join(f"{value:g} {resource}" for resource, value in bundle(role).items())
            problems.append(f"roles.{name}: no single node has {asked}, which each of its processes needs")
    return problems


def bundle(role: RoleSpec) -> dict[str, float]:
    """Ray resources of one process of a role."""
    asked = {"CPU": role.cpus, "GPU": role.gpus, **role.resources}
    return {name: float(amount) for name, amount in asked.items() if amount > 0}


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


def _connect(address: str, quiet: Mapping[str, Any]) -> None:
    import ray

    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"ray.address: no Ray cluster could be used at {address}: {str(error).strip().splitlines()[0]}. "
            "Start one with `ray start --head`, or leave ray.address out for a local one"
        ) from None


def _mute_raylet() -> None:
    """Keep Ray's half page per dead worker off the terminal: whoever waits for the worker reports its death.

    Ray prints it from a thread of the driver whatever `log_to_driver` says, and has no setting for that.
    """
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *args, **kwargs: None


def _make_importable() -> None:
    """Let the workers of a local cluster import what this process runs, installed or from a checkout."""
    root = str(Path(__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, known)])


def _totals(resources: Mapping[str, float]) -> dict[str, float]:
    return {
        name: float(amount)
        for name, amount in resources.items()
        if not name.startswith(("node:", "object_store"))
    }

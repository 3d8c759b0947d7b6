"""Settings of roles and of the cluster: resources, threads, deadlines.

Specs only, importable without Ray or torch; `actors.cluster.connection` and `actors.cluster.worker_group`
act on them.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from actors.spec import Spec

Phase = Literal[
    "start", "load", "update", "evaluate", "logprobs", "generate", "save", "restore", "sync", "call", "stop"
]
"""Phases of an actor's work; each has its deadline in `LimitsSpec`."""

Sharding = Literal["none", "base", "full", "experts", "experts+base", "experts+full"]
"""`none`: every rank holds all weights. `base`: the frozen base is split by torch's `fully_shard` (FSDP2),
gathered a layer at a time; adapters stay whole. `full`: all is split, gradients and optimizer too. `experts`:
each rank holds some experts of every layer, and tokens are sent to them; the rest is whole on every rank.
`experts+base` and `experts+full`: experts as in `experts`, the rest as in the other."""


def splits_experts(sharding: Sharding) -> bool:
    """True where each rank holds some experts, which are not gathered."""
    return sharding.startswith("experts")


def splits_layers(sharding: Sharding) -> bool:
    """True where `fully_shard` splits layers and gathers them for a pass, with their experts or without."""
    return sharding.endswith(("base", "full"))


_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_OWNED, _RAYS = ("PATH", "HOME", "TMPDIR", "CUDA_VISIBLE_DEVICES"), ("RAY_", "RAYLIGN_", "PYTHON", "LD_")


class RoleSpec(Spec):
    """Processes and resources of one role (policy, reference, rollout, ...)."""

    workers: int = Field(default=1, ge=1)
    """Processes of this role: data-parallel ranks of a host, or engines of the rollout role."""
    cpus: float = Field(default=0.25, gt=0)
    """CPUs that Ray reserves for each process; a fraction lets roles share a core."""
    gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for each process; a fraction is for processes that exchange nothing over NCCL.
    Trainer and engines have one GPU in turns by `share: policy` of the rollout role."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources that each process asks for, e.g. `{"big-memory-node": 1}`."""
    threads: int = Field(default=1, ge=1)
    """Compute threads (OpenMP, torch) of each process. Not tied to `cpus`, which only reserves."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """Placement of the processes on nodes: together, or apart; `strict_` makes it a condition."""
    sharding: Sharding = "none"
    """Weights that the `workers` of a host split among them: none, the frozen `base`, all (`full`, FSDP2),
    the `experts`, or these and the rest too (`experts+base`, `experts+full`). It needs two workers or more;
    rollout engines don't have it."""
    expert_parallel_size: int | None = Field(default=None, ge=2)
    """Consecutive `workers` that split weights among them where `sharding` splits experts; other groups of as
    many hold the same. Divides `workers`; null: all of them."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Consecutive `workers` that hold one model together, each a part of every layer, and compute the same
    rows; groups of them share the rows out. Divides `workers`. Engines have a key of their own for it."""
    sequence_parallel_size: int = Field(default=1, ge=1)
    """Consecutive `workers` that share out the positions of the same rows, which may be too long for one;
    groups of them share the rows out. Divides `workers` and the base's attention heads."""
    share: str | None = None
    """Be a view of that role's host (no processes, no second base in memory). Excludes the others."""

    beside_share: ClassVar[tuple[str, ...]] = ("share",)
    """Keys that can be set together with `share`."""
    shares: ClassVar[str] = "processes"
    """Of the other role, with `share`."""

    @model_validator(mode="after")
    def _share_takes_nothing(self) -> Self:
        others = sorted(self.model_fields_set - {*self.beside_share})
        if self.share is not None and others:
            raise ValueError(
                f"share: {self.share} puts this role on the {self.shares} of {self.share}, so it can't set "
                f"{', '.join(others)}: set them on {self.share}, or leave share out"
            )
        return self


class LimitsSpec(Spec):
    """Memory, bounds of what is replaced, and deadlines in seconds. Past one, the run ends with the role, the
    rank and the phase's name, or an engine is replaced. Those of `update`, `evaluate`, `logprobs` and
    `generate` that are left out get shorter once a stage has measured its first calls
    (`actors.cluster.measured_limits`)."""

    memory: Literal["check", "ignore"] = "check"
    """`check`: refuse a run whose weights, gradients and moments alone are more than this machine's memory,
    where no role has GPUs. `ignore`: start it."""
    start: float = Field(default=180, gt=0)
    """Process start and imports, and the rendezvous of a group's ranks."""
    room: float = Field(default=600, gt=0)
    """Wait for room on another node, for a process whose node has died; past it the run ends."""
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
    grace: float = Field(default=25, gt=0)
    """From SIGTERM to the SIGKILL that a scheduler sends next: a checkpoint is complete by then, if need be
    without the step in flight."""
    stop: float = Field(default=5, gt=0)
    """A clean end of an actor, before it is killed."""
    max_restarts: int = Field(default=3, ge=0)
    """Times that a process of a role is replaced within `restart_window`, on average: a role of n processes
    has n times as many in all. The next loss ends the run, and so does the third at the same place. 0: every
    loss does."""
    restart_window: float = Field(default=3600, gt=0)
    """Seconds after which a replaced process is no longer counted."""

    def of(self, phase: Phase) -> float:
        """Deadline of `phase` in seconds."""
        return float(getattr(self, phase))


def bundle(role: RoleSpec) -> dict[str, float]:
    """Ray resources of one process of a role."""
    asked = {"CPU": role.cpus, "GPU": role.gpus, **role.resources}
    return {name: float(amount) for name, amount in asked.items() if amount > 0}


class RaySpec(Spec):
    """The Ray cluster that runs the actors: a running one, or a local one and how it starts."""

    address: str | None = None
    """`auto` or `host:port` of a running cluster; null: a local one that ends with the run."""
    num_cpus: float | None = Field(default=None, gt=0)
    """CPUs of the local cluster; null: as many as the machine has."""
    object_store_memory: int | None = Field(default=None, ge=80_000_000)
    """Bytes of the local cluster's object store; null: Ray's choice."""
    fast_start: bool = True
    """Start a local cluster without Ray's dashboard, log monitor and agents, and fork its workers from one
    process that has made the imports. false: Ray's own way, some seconds slower, with the same results."""
    env: list[str] = Field(default_factory=list)
    """Names of environment variables that the run and all its processes get, such as `HF_TOKEN`. Their values
    are those where the command is typed, also of a submitted job, and are written nowhere."""

    @field_validator("env", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        """Refuse all but names, without a word of what was given: it may be a secret."""
        right = "a list of names of environment variables, without values: [HF_TOKEN, WANDB_API_KEY]"
        names: list[Any] = value if isinstance(value, list) else [None]
        if not all(isinstance(name, str) and _NAME.match(name) for name in names):
            raise ValueError(f"must be {right}")
        if owned := [name for name in names if name in _OWNED or name.startswith(_RAYS)]:
            raise ValueError(f"{', '.join(owned)}: of each machine or of Ray, not passed on; must be {right}")
        return list(dict.fromkeys(value))

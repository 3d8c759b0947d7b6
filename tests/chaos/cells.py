"""The matrix: which process is lost at which moment in which way, and what is not worth a run. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

ROLES = (
    "driver", "policy-0", "policy-1", "reference-0", "critic-0", "reward-0", "rollout-0", "rollout-1",
    "raylet", "gcs", "node",
)  # fmt: skip
"""Processes as logs name them; `node`: a raylet with all that it started, beside the one of the driver."""
PHASES = (
    "start", "load", "generation", "scoring", "update", "sync stage", "sync commit", "save", "evaluation",
)  # fmt: skip
WAYS = ("kill", "stop")
"""SIGKILL and SIGSTOP."""
SCENES = ("ppo", "dpo", "nodes")
"""Runs in which it happens: PPO with every role in processes of its own, DPO with two ranks and a reference,
and the PPO run on a cluster of several nodes."""
FORMS: dict[str, tuple[tuple[str, str], ...]] = {
    "one": (("policy-0", "scoring"), ("policy-0", "update"), ("policy-0", "sync stage")),
    "base": (("policy-1", "scoring"), ("policy-0", "update")),
    "full": (("policy-1", "update"), ("policy-0", "sync stage"), ("policy-1", "save")),
    "experts": (("policy-1", "scoring"), ("policy-1", "sync stage"), ("policy-0", "save")),
    "experts+full": (("policy-3", "update"), ("policy-1", "sync stage"), ("policy-2", "save")),
    "tensor": (("policy-0", "scoring"), ("policy-1", "update"), ("policy-1", "sync stage")),
    "whole": (("policy-0", "update"), ("policy-1", "save")),
    "sft": (("policy-0", "update"),),
    "reward": (("policy-1", "update"), ("policy-0", "save")),
    "kto": (("policy-0", "update"),),
    "guests": (("node", "generation"), ("node", "update")),
}
"""Further scenes, other forms of a policy and other stages: the ranks that are killed, at which moments. They
always have to be replaced. `guests`: engines in turns on the nodes of the policy's ranks."""
ON_NODES = ("nodes", "guests")
"""Scenes on a cluster of several nodes."""
EARLY = ("start", "load")
"""Phases that a life of a run has once."""
WATCHED = ("driver", "raylet", "gcs")
"""Their death ends the run: a driver can't outlive itself, nor Ray."""

Call = tuple[str, str]
"""Method and phase, as a process's trace has them."""

_HOST: dict[str, Call] = {"load": ("build", "load")}
CALLS: dict[str, dict[str, Call]] = {
    "policy": _HOST
    | {
        "scoring": ("scores.token_logprobs", "logprobs"),
        "update": ("updates.update", "update"),
        "sync stage": ("weight_source.prepare", "sync"),
        "sync commit": ("scores.token_logprobs", "sync"),
        "save": ("saving.save_checkpoint", "save"),
    },
    "reference": _HOST | {"scoring": ("scores.token_logprobs", "logprobs")},
    "critic": _HOST
    | {
        "scoring": ("scores.values", "logprobs"),
        "update": ("updates.update", "update"),
        "save": ("saving.save_checkpoint", "save"),
    },
    "reward": _HOST | {"scoring": ("scores.scores", "logprobs")},
    "rollout": {
        "start": ("build", "load"),
        "load": ("load", "load"),
        "generation": ("advance", "generate"),
        "sync stage": ("weights.stage", "sync"),
        "sync commit": ("weights.commit", "sync"),
        "evaluation": ("advance", "generate"),
    },
}
"""What a process of each kind works at in each phase."""
LEADERS = {
    "load": "policy-0", "generation": "rollout-0", "scoring": "policy-0", "update": "policy-0",
    "sync stage": "rollout-0", "sync commit": "rollout-0", "save": "policy-0", "evaluation": "rollout-0",
}  # fmt: skip
"""Whose work shows that a phase is on, where the one that is lost has none in it."""


def kind_of(role: str) -> str:
    """`policy` of `policy-1`."""
    return role.partition("-")[0]


@dataclass(frozen=True)
class Cell:
    """One loss."""

    scene: str
    role: str
    phase: str
    way: str
    seed: int = 0

    @property
    def key(self) -> str:
        return ":".join((self.scene, self.role, self.phase.replace(" ", "-"), self.way, str(self.seed)))

    @property
    def early(self) -> bool:
        return self.phase in EARLY

    def moment(self) -> float:
        """The part of the phase's length after which it happens, in [0, .9): a function of the cell."""
        return 0.9 * random.Random(self.key).random()

    def leader(self) -> tuple[str, Call | None]:
        """The process whose call shows that the phase is on, and that call; None: its log's first line."""
        own = CALLS.get(kind_of(self.role), {}).get(self.phase)
        if own is not None:
            return self.role, own
        if self.phase == "start":
            return (self.role if kind_of(self.role) in CALLS else "policy-0"), None
        leader = LEADERS[self.phase]
        return leader, CALLS[kind_of(leader)][self.phase]


def senseless(cell: Cell) -> str | None:
    """The reason why a cell is left out, or None."""
    kind, own = kind_of(cell.role), CALLS.get(kind_of(cell.role), {})
    if cell.scene in FORMS:
        return None
    if cell.scene == "nodes" or cell.role == "node":
        if cell.role != "node" or cell.scene != "nodes":
            return "a run on one machine has one node, whose loss is the raylet's"
        if cell.phase not in ("generation", "update", "sync stage"):
            return "the node that is lost holds an engine: see its row"
        return "a node is not stopped but lost" if cell.way == "stop" else None
    if cell.scene == "dpo":
        if kind in ("critic", "reward", "rollout"):
            return "DPO has no such role"
        if cell.phase in ("generation", "sync stage", "sync commit", "evaluation"):
            return "DPO has no such phase"
        if cell.role in WATCHED and (cell.role, cell.phase) != ("driver", "update"):
            return "the driver and Ray are the same as in PPO"
        if cell.phase == "scoring":
            return "the reference is asked ahead, in the first seconds: as its load"
    if cell.role == "driver" and cell.way == "stop" and cell.early:
        return "a driver that is stopped goes on when it is told to: seen in later phases"
    if kind in CALLS and cell.phase == "evaluation" and "evaluation" not in own:
        return "it has no processes: evaluation asks engines"
    if kind in CALLS and cell.phase not in (*own, "start"):
        if (cell.phase, cell.way) == ("generation", "kill") and kind != "rollout":
            return None
        return "it waits: found at its next call, as in the phases where it works"
    if cell.role in ("raylet", "gcs") and cell.way == "stop":
        return None if cell.phase in ("load", "generation") else "the watch over Ray knows no phases"
    return None


def all_cells(seeds: int = 1) -> Iterator[Cell]:
    """Every combination, those that are left out too, and the cells of the forms."""
    for seed in range(seeds):
        for scene in SCENES:
            for role in ROLES:
                for phase in PHASES:
                    for way in WAYS:
                        yield Cell(scene, role, phase, way, seed)
        for form, moments in FORMS.items():
            for role, phase in moments:
                yield Cell(form, role, phase, "kill", seed)


def chosen(patterns: Sequence[str], seeds: int) -> list[Cell]:
    """Cells that make sense and whose key one of the patterns (`ppo:policy-*:update:*`) names; all without
    patterns."""
    wanted = [cell for cell in all_cells(seeds) if senseless(cell) is None]
    if not patterns:
        return wanted
    return [cell for cell in wanted if any(fnmatch(cell.key, pattern + "*") for pattern in patterns)]


def next_cell(cells: Iterable[Cell], under_way: bool, ends: Sequence[str] = WATCHED) -> Cell | None:
    """The cell to do next in a scene. Where a life of the run begins, an early one if there is any; later on
    one that is not early, and while early ones wait for lives to begin, rather one that ends this life. Those
    of the evaluation come last."""
    left = list(cells)
    early = [cell for cell in left if cell.early]
    late = [cell for cell in left if not cell.early and cell.phase != "evaluation"]
    if under_way and early:
        late = [cell for cell in late if cell.role in ends] or late
    order = [*late, *early] if under_way else [*early, *late]
    return next(iter(order or left), None)

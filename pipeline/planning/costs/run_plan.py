"""The plan of a run: memory of its processes, seconds of its steps, syncs, storage, and what would make it
fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.planning.costs.changes import in_words, overfull, ways_to_fit
from pipeline.planning.costs.devices import GIB
from pipeline.planning.costs.nodes_of import UsedNode, laid_out
from pipeline.planning.costs.processes import Budget, ProcessMemory
from pipeline.planning.costs.seconds import StepTime, step_time, sync_seconds
from pipeline.planning.costs.storage import Storage, storage_of

if TYPE_CHECKING:
    from actors.models.facts import BaseSizes
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.costs.devices import Device


@dataclass(frozen=True)
class RunPlan:
    """All that a plan says."""

    device: Device
    elements: int
    """Parameters of the base."""
    active: float
    """Of them, those that act on one token."""
    processes: list[ProcessMemory]
    together: int
    """Bytes of all that live at one time."""
    nodes: list[UsedNode]
    steps: list[StepTime]
    syncs: dict[str, tuple[int, float]]
    """Payload -> (bytes to each engine, seconds); empty without online stages."""
    storage: Storage
    too_large: list[ProcessMemory]
    ways: list[str]
    """Settings by which it would fit, nearest first; empty where it fits, or where none was found."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        sizes: BaseSizes,
        device: Device,
        longest: dict[str, int] | None = None,
        judges: Mapping[str, BaseSizes] | None = None,
    ) -> RunPlan:
        """Of a run on one kind of device. `longest`: tokens of each stage's longest sequence, if known;
        `judges`: as of `Budget`."""
        budget = Budget(config, sizes, device, longest or {}, judges or {})
        too_large = overfull(budget)
        ways = ways_to_fit(budget) if too_large else []
        return cls(
            device=device,
            elements=sizes.elements,
            active=sizes.active_elements() + sizes.head_elements,
            processes=budget.processes(),
            together=budget.together(),
            nodes=laid_out(config, device),
            steps=[step_time(budget, name) for name in config.stages],
            syncs=dict(sync_seconds(budget)) if config.online_stages() else {},
            storage=storage_of(budget),
            too_large=too_large,
            ways=[in_words(way) for way in ways],
        )

    @property
    def largest(self) -> ProcessMemory:
        """Of all processes the one that takes the largest part of its room."""
        return max(self.processes, key=lambda p: p.total / p.room)

    def line(self) -> str:
        """The plan in one line."""
        one = self.largest
        if self.device.is_gpu:
            said = f"{one.name} in {one.stage} takes {gib(one.total)} of {gib(self.device.memory)}"
        else:
            said = f"all processes take {gib(self.together)} of {gib(self.device.memory)} together"
        fits = "it fits" if not self.too_large else "it does not fit"
        return f"planned memory on {self.device.name}: {said}; {fits}"

    def sentences(self) -> str:
        """The plan in a few sentences, for the head of a config."""
        largest: dict[str, ProcessMemory] = {}
        for one in self.processes:
            if one.role not in largest or one.total > largest[one.role].total:
                largest[one.role] = one
        roles = [f"{p.name} {gib(p.total)} ({_parts(p)}){_notes(p)}" for p in largest.values()]
        steps = [f"{s.stage} {s.seconds:,.0f} s, bound by {s.bound}" for s in self.steps]
        sent = [f"{size / 1e6:,.0f} MB ({name})" for name, (size, _) in self.syncs.items()]
        where, memory = self.device.name, gib(self.device.memory)
        return (
            f"Planned by `raylign plan --gpu {where}`, not run: {self.elements / 1e9:.1f} B parameters, "
            f"{self.active / 1e9:.1f} B for one token. Of {memory} on a GPU: {'; '.join(roles)}."
            f" A step at assumed rates: {'; '.join(steps)}."
            + (f" A sync sends each engine {', '.join(sent)}." if sent else "")
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, bytes and seconds."""
        return {
            "device": vars(self.device),
            "parameters": self.elements,
            "active_parameters": int(self.active),
            "fits": not self.too_large,
            "ways_to_fit": self.ways,
            "processes": [
                {
                    "role": p.role,
                    "ranks": [p.ranks[0], p.ranks[-1]],
                    "stage": p.stage,
                    "on_gpu": p.on_gpu,
                    "bytes": p.total,
                    "room": p.room,
                    "parts": p.parts,
                    "notes": list(p.notes),
                }
                for p in self.processes
            ],
            "nodes": [vars(node) for node in self.nodes],
            "steps": [
                {
                    "stage": s.stage,
                    "seconds": s.seconds,
                    "bound": s.bound,
                    "tokens": s.tokens,
                    "parts": s.parts,
                }
                for s in self.steps
            ],
            "syncs": {name: {"bytes": size, "seconds": s} for name, (size, s) in self.syncs.items()},
            "storage": vars(self.storage),
        }


NAMED = 3
"""Parts of a process that are named where there is little room."""


def _parts(process: ProcessMemory) -> str:
    parts = sorted(process.parts.items(), key=lambda part: -part[1])[:NAMED]
    return ", ".join(f"{name} {gib(size)}" for name, size in parts)


def _notes(process: ProcessMemory) -> str:
    return "".join(f", {note}" for note in process.notes)


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"

"""Shows `raylign plan`: tables by role and rank, syncs, steps, storage, and what would have to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from actors.errors import EXIT_DONE
from pipeline.monitoring import console
from pipeline.monitoring.progress import working

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.costs.processes import ProcessMemory
    from pipeline.planning.costs.run_plan import RunPlan

SHOWN_PARTS = 8
"""Of a process, the largest."""


def show_plan(config: RunConfig, gpu: str | None, as_json: bool) -> int:
    """Print a plan.

    Raises:
        UserError: the base's config can't be read, or roles have no such device.
    """
    with working(f"reading the config of {config.model.base}"):
        from pipeline.planning.planned import plan

        found = plan(config, gpu)
    if as_json:
        import json

        print(json.dumps(found.to_json(), indent=1))
        return EXIT_DONE
    _show(config, found)
    return EXIT_DONE


def _show(config: RunConfig, plan: RunPlan) -> None:
    from pipeline.planning.costs.run_plan import gib

    device = plan.device
    whole, active = _count(plan.elements), _count(plan.active)
    console.say(
        f"base {config.model.base}: {whole} parameters, {active} of them for one token; {device.name} with "
        f"{gib(device.memory)}"
    )
    console.say(
        f"rates {'measured on this machine' if device.measured else 'assumed, not measured'}: "
        f"{device.products / 1e12:,.2f} TFLOP/s of products, {device.bandwidth / 1e9:,.0f} GB/s of memory"
    )
    columns = ["stage", "processes", "in all", "of", "parts"]
    console.table("Memory of each process", columns, [_row(p, plan) for p in plan.processes])
    console.say(plan.line())
    for way in plan.ways:
        console.say(f"  it would fit with {way}")
    if plan.too_large and not plan.ways:
        console.say("  no change of a setting or two was found with which it would fit")
    console.table("Nodes", ["node", "processes"], _nodes(plan))
    steps = [[s.stage, _seconds(s.seconds), s.bound, f"{s.tokens:,}", _parts_of(s.parts)] for s in plan.steps]
    console.table(
        "A step, with sequences as long as they may be",
        ["stage", "seconds", "bound by", "tokens", "parts"],
        steps,
    )
    syncs = [[name, f"{size:,}", _seconds(seconds)] for name, (size, seconds) in plan.syncs.items()]
    console.table("A sync, by sync.payload", ["payload", "bytes to each engine", "seconds"], syncs)
    for line in _storage(plan):
        console.say(line)


def _count(elements: float) -> str:
    return f"{elements / 1e9:,.2f} B" if elements >= 1e8 else f"{elements / 1e6:,.1f} M"


def _row(process: ProcessMemory, plan: RunPlan) -> list[str]:
    from pipeline.planning.costs.run_plan import gib

    parts = sorted(process.parts.items(), key=lambda part: -part[1])[:SHOWN_PARTS]
    said = ", ".join(f"{name} {gib(size)}" for name, size in parts)
    of = gib(process.room) if process.on_gpu == plan.device.is_gpu else "its host"
    mark = " (too much)" if process.on_gpu and process in plan.too_large else ""
    notes = "".join(f"; {note}" for note in process.notes)
    return [process.stage, process.name, gib(process.total) + mark, of, said + notes]


def _nodes(plan: RunPlan) -> list[list[str]]:
    return [
        [str(i), ", ".join(f"{n} x {role}" for role, n in node.processes.items())]
        for i, node in enumerate(plan.nodes)
    ]


def _parts_of(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in parts.items())


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.2g}"


def _storage(plan: RunPlan) -> Iterator[str]:
    from pipeline.planning.costs.run_plan import gib

    storage = plan.storage
    for role, size in storage.loading.items():
        yield f"host memory while {role} loads: {gib(size)} over its hosts"
    if storage.merge:
        yield f"host memory of raylign merge: {gib(storage.merge)}"
    yield (
        f"disk: {gib(storage.checkpoints)} for checkpoints, {gib(storage.results)} for results; Ray's object "
        f"store: {gib(storage.object_store)} for the largest batch, "
        f"{gib(storage.snapshots)} for snapshots of what trains"
    )
    if storage.temporary:
        yield (
            f"temporary files (TMPDIR): {gib(storage.temporary)} while a stage starts; while an evaluation "
            f"loads {gib(storage.merged_copies)}, only if its engines have to have a merged model"
        )

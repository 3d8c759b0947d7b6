"""Host memory to load and merge, disk, temporary files, and what Ray's object store holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.planning.costs.payloads import payload_bytes
from pipeline.planning.costs.weights import ADAPTER_BYTES, MOMENTS, Holding, base_bytes
from pipeline.roles import ENGINE_ROLES, ROLES

if TYPE_CHECKING:
    from pipeline.planning.costs.processes import Budget

READ_AT_ONCE = 128 * 2**20
"""Bytes of tensors that are read before what that took is given back (`models.parallel.by_layer`)."""
PER_TOKEN = 4 + 1 + 6 * 4
"""Bytes of a token in a batch: its id, its mask, and up to six float columns (`actors.batches.batch`)."""

SNAPSHOTS = 3
"""Copies of what steps change, at most: the last one, the next, and that of the version that engines have."""


@dataclass(frozen=True)
class Storage:
    """Bytes outside of devices."""

    loading: dict[str, int]
    """Role -> memory of hosts that all its processes take together while they read the base onto GPUs: each
    reads a layer at a time, straight to its device."""
    merge: int
    """Memory that `raylign merge` takes: it goes from file to file, a tensor at a time; its comparison has a
    layer of base and merged model, in float32 at most."""
    checkpoints: int
    """Disk for the checkpoints of the stage that needs most: those kept, and one that is being written."""
    results: int
    """Disk for the results of all stages."""
    object_store: int
    """The largest batch of a step."""
    snapshots: int
    """There too: what lost ranks are made again from (`actors.cluster.snapshots`)."""
    temporary: int
    """Files in TMPDIR while a stage starts: each policy rank's copy of an adapter."""
    merged_copies: int
    """There too, while an evaluation loads, where engines can't take an adapter over their base: a merged
    model for each engine of a node."""


def storage_of(budget: Budget) -> Storage:
    """Of one run."""
    config, sizes = budget.config, budget.sizes
    model = config.model
    whole = sizes.elements * Holding(model, "none", 1, 1, False).element
    layer = max((one.elements for one in sizes.layers), default=0) * ADAPTER_BYTES
    loading = {}
    for role in ROLES:
        spec = config.roles.of(role)
        if config.roles.server_of(role) != role or role in ENGINE_ROLES or not spec.gpus:
            continue
        held = base_bytes(sizes, Holding.of(model, spec))
        loading[role] = spec.workers * min(held, READ_AT_ONCE + layer)
    one = whole if model.lora is None else sizes.adapter_elements(model.lora) * ADAPTER_BYTES
    changes = [
        one * (1 + MOMENTS[stage.optim]) * (2 if stage.critic is not None else 1)
        for stage in config.stages.values()
    ]
    kept = [(stage.save_total_limit + 1) * size for stage, size in zip(config.stages.values(), changes)]
    snapshots = SNAPSHOTS * max(changes, default=0) + one * len(changes)
    tokens = max(
        budget.work(name).tokens * (stage.steps_per_generation if stage.online else 1)
        for name, stage in config.stages.items()
    )
    touched = payload_bytes("merged", sizes, model) if model.lora is not None else 0
    largest = max((w.elements for w in sizes.weights), default=0)
    merging = min(whole, 2 * layer + READ_AT_ONCE) + 3 * largest * ADAPTER_BYTES if touched else 0
    copies = one * config.roles.policy.workers if model.lora is not None else 0
    merged = whole * config.roles.rollout.workers if touched else 0
    results = one * len(config.stages)
    return Storage(
        loading, merging, max(kept, default=0), results, PER_TOKEN * tokens, snapshots, copies, merged
    )

"""Plans of runs on what is there: the base's config.json, and this machine or a GPU by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from actors.cluster import local_memory
from actors.errors import UserError
from pipeline.planning.costs.changes import Changes, in_words, ways_to_fit
from pipeline.planning.costs.devices import DEFAULT_GPU, GPUS, Device, cpu
from pipeline.planning.costs.processes import ALWAYS, Budget
from pipeline.planning.costs.run_plan import RunPlan, gib
from pipeline.planning.resources import working_roles

if TYPE_CHECKING:
    from actors.models.facts import BaseSizes
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.costs.processes import ProcessMemory

LARGEST = 3
"""Parts of a process that a refusal names."""


def plan(config: RunConfig, gpu: str | None = None) -> RunPlan:
    """The plan of a run, from its config and its base's config.json.

    Args:
        config: the run.
        gpu: a key of `GPUS`; `cpu`: this machine, whose rates are measured for some seconds; None: h100-80
            where a role has GPUs, else this machine at rates that are assumed.

    Raises:
        UserError: the base's config can't be read, or roles have no such device.
    """
    from actors.models.base.loading import resolve_base
    from actors.models.facts import base_sizes

    has_gpus = any(config.roles.gpus_of(role) for role in working_roles(config))
    if problem := _why_not(gpu, has_gpus):
        raise UserError(problem)
    # Weights are not looked for: random ones need none.
    base = resolve_base(config.model.model_copy(update={"random_init": True})).checked()
    sizes = base_sizes(base.config, quantization=config.model.quantization)
    return RunPlan.of(
        config, sizes, _device(config, sizes, gpu, has_gpus), judges=judges_of(config, all_found=True)
    )


def judges_of(config: RunConfig, *, all_found: bool = False) -> dict[str, BaseSizes]:
    """Sizes of the models that the run's own engines judge samples with, by their names in the config.

    `all_found`: one that can't be read is an error; else it is left out, as it is refused where rewards are
    looked at.

    Raises:
        UserError: `all_found`, and the config of one can't be read.
    """
    from actors.models.base.loading import resolve_base
    from actors.models.facts import base_sizes

    found = {}
    for model in {one for stage in config.stages.values() for one in stage.judge_models}:
        base = resolve_base(config.judge_settings(model).model_copy(update={"random_init": True}))
        if all_found or (base.config is not None and not base.problems):
            found[model] = base_sizes(base.checked().config)
    return found


def _why_not(gpu: str | None, has_gpus: bool) -> str:
    known = ", ".join((*GPUS, "cpu"))
    if gpu is not None and gpu not in (*GPUS, "cpu"):
        return f"--gpu {gpu}: no rates are known of it; one of {known}"
    if gpu == "cpu" and has_gpus:
        return f"--gpu cpu: roles of this run have GPUs; name one of {', '.join(GPUS)}, or set gpus to 0"
    if gpu not in (None, "cpu") and not has_gpus:
        return f"--gpu {gpu}: no role of this run has GPUs; set roles.policy.gpus=1, or leave --gpu out"
    return ""


def _device(config: RunConfig, sizes: BaseSizes, gpu: str | None, has_gpus: bool) -> Device:
    if has_gpus:
        return GPUS[gpu or DEFAULT_GPU]
    machine = cpu(local_memory())
    if gpu != "cpu":
        return machine
    from actors.models.facts import measure_cpu

    rates = measure_cpu(sizes, config.roles.policy.threads, config.model.dtype)
    return replace(machine, measured=True, **rates._asdict())


def memory_line(config: RunConfig, sizes: BaseSizes, longest: dict[str, int]) -> str:
    """The plan of memory in a line: on this machine, or on GPUs of the usual size."""
    has_gpus = any(config.roles.gpus_of(role) for role in working_roles(config))
    device = GPUS[DEFAULT_GPU] if has_gpus else cpu(local_memory())
    return RunPlan.of(config, sizes, device, longest, judges_of(config)).line()


def memory_problems(
    config: RunConfig, sizes: BaseSizes | None, stages: Iterable[str], local: bool
) -> list[str]:
    """Reasons why this machine's memory, swap included, can't hold a run whose roles have no GPUs, whatever
    rows come: weights, adapters, gradients, moments and the smallest cache alone are more.

    `stages`: those that have to run; `local`: on a cluster of this machine's own.

    None where `limits.memory` is `ignore`, where the run is to be on another cluster, and without sizes.
    """
    on_gpu = any(config.roles.gpus_of(role) for role in working_roles(config))
    if sizes is None or on_gpu or config.limits.memory == "ignore" or not local:
        return []
    memory = local_memory()
    budget = Budget(config, sizes, cpu(memory), {}, judges_of(config))
    for stage in stages:
        here = [p for p in budget.processes() if p.stage == stage]
        least = sum(p.certain * len(p.ranks) for p in here)
        if least > memory:
            return [_refusal(stage, least, memory, here, ways_to_fit(budget, most=1))]
    return []


def _refusal(stage: str, least: int, memory: int, here: list[ProcessMemory], ways: list[Changes]) -> str:
    parts = [
        (size * len(p.ranks), f"{part} of {p.name}")
        for p in here
        for part, size in p.parts.items()
        if part in ALWAYS
    ]
    shown = ", ".join(f"{gib(size)} {what}" for size, what in sorted(parts, reverse=True)[:LARGEST])
    instead = f"it would fit with {in_words(ways[0])}" if ways else "take a smaller base or a larger machine"
    return (
        f"limits.memory: stage {stage} takes at least {gib(least)} ({shown}), and this machine has "
        f"{gib(memory)}, swap included; {instead}, or set ignore"
    )

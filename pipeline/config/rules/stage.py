"""Rules between the fields of one stage. Pure: a stage in, every violation out, by the keys within it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config.problem import Problem
from pipeline.config.rules.online import online_problems
from pipeline.data.spec import DataSpec, without_weight
from pipeline.stages.specs.registry import AnyStage, StageSpec

SCHEDULE_ARGUMENTS: dict[str, frozenset[str]] = {
    "linear": frozenset(),
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "cosine_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "cosine_warmup_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "constant": frozenset(),
    "constant_with_warmup": frozenset(),
    "inverse_sqrt": frozenset({"timescale"}),
    "warmup_stable_decay": frozenset(
        {"num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"}
    ),
}
"""Arguments of transformers' schedules, in lr_scheduler_kwargs (a test compares the installed ones)."""


def stage_problems(stage: AnyStage) -> Iterator[Problem]:
    """Every rule between its own fields that `stage` breaks."""
    if stage.max_steps == 0:
        yield Problem("max_steps", "0 steps train nothing; -1 goes by num_train_epochs")
    if stage.warmup_steps >= 1 and stage.warmup_steps != int(stage.warmup_steps):
        yield Problem("warmup_steps", f"{stage.warmup_steps:g}: a whole number of steps, or a share below 1")
    updates = stage.max_steps * stage.updates_per_step
    if 0 < updates < stage.warmup_steps:
        yield Problem(
            "warmup_steps",
            f"{stage.warmup_steps:g} is longer than the stage ({updates} optimizer steps, by max_steps: "
            f"{stage.max_steps})",
        )
    if stage.eval_steps is not None and stage.eval_data is None:
        yield Problem("eval_steps", "there is no eval_data to evaluate on; add it, or remove eval_steps")
    yield from mixture_problems("data", stage.data)
    yield from mixture_problems("eval_data", stage.eval_data or [])
    yield from _schedule_problems(stage)
    yield from (Problem(key, message) for key, message in stage.loss_problems())
    if stage.online:
        yield from online_problems(stage)


def mixture_problems(key: str, sources: Sequence[DataSpec]) -> Iterator[Problem]:
    """Weights on some of the sources under `key`."""
    if lacking := without_weight(sources):
        named = ", ".join(f"{key}.{number}" for number in lacking)
        yield Problem(key, f"give a weight to each or to none (without: {named})")


def _schedule_problems(stage: StageSpec) -> Iterator[Problem]:
    known = SCHEDULE_ARGUMENTS[stage.lr_scheduler_type]
    for key in stage.lr_scheduler_kwargs:
        if key not in known:
            takes = ", ".join(sorted(known)) or "no arguments"
            yield Problem(f"lr_scheduler_kwargs.{key}", f"{stage.lr_scheduler_type} takes {takes}")
    given = set(stage.lr_scheduler_kwargs)
    if "min_lr" in known and len(given & {"min_lr", "min_lr_rate"}) != 1:
        yield Problem("lr_scheduler_kwargs", f"{stage.lr_scheduler_type} needs one of min_lr and min_lr_rate")
    if stage.lr_scheduler_type == "warmup_stable_decay" and "num_decay_steps" not in given:
        yield Problem("lr_scheduler_kwargs", "warmup_stable_decay needs num_decay_steps")

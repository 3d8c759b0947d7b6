"""The training loop that every offline stage goes through: batches in, verified steps, one artifact out."""

from __future__ import annotations

import shutil
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.algorithms import DpoLoss, KtoLoss
from pipeline.artifacts.identity import Decision, checkpoints
from pipeline.artifacts.manifest import Manifest, new_directory
from pipeline.stages.checks import check_first_step, check_unmoved
from pipeline.stages.metrics import MetricsLog
from pipeline.stages.prepared import PreparedStage

if TYPE_CHECKING:
    from actors.cluster import GroupFuture
    from pipeline.stages.offline.reference import ReferenceFeed
from pipeline.stages.context import StageContext, Stopped, finish, saves_at, sound_checkpoint

AHEAD = 2
"""Steps handed to the ranks before the first of them is back: the driver's work for a step (rows, the
object store, logging) then hides behind the ranks' own. More would only delay a stop."""


@dataclass(kw_only=True)
class TrainContext(StageContext):
    """The context of an offline stage."""

    reference: ReferenceFeed | None


def train(stage: PreparedStage, ctx: TrainContext, decision: Decision) -> Manifest:
    """Run a stage to its end, from its last checkpoint if there is one.

    Raises:
        Stopped: after saving, when a stop was asked for.
        RunFailure: a rank failed, overran a deadline, or an invariant did not hold.
    """
    began = time.monotonic()
    ctx.policy.prepare(stage.spec.optim_spec(), stage.total_steps)
    step = restore(ctx, decision)
    frozen = ctx.policy.frozen_digest()
    log = MetricsLog(
        ctx.directory / "metrics.jsonl",
        resume_at=step,
        every=ctx.logging_steps,
        checkpoint=decision.checkpoint,
    )
    in_flight: deque[tuple[int, GroupFuture[dict[str, float]]]] = deque()

    def collect() -> None:
        number, pending = in_flight.popleft()
        metrics = pending.result()[0]
        metrics["epoch"] = round(stage.epoch(number + 1), 4)
        if number == 0 and isinstance(stage.loss, DpoLoss | KtoLoss) and ctx.starts_as_reference:
            check_first_step(stage.name, stage.loss, metrics, ctx.dtype)
        line = log.add(number + 1, metrics, final=number + 1 == stage.total_steps)
        ctx.on_step(number + 1, metrics)
        if line:
            ctx.on_log(line)

    try:
        while step < stage.total_steps:
            batch = with_reference(stage, ctx.reference, step)
            in_flight.append((step, ctx.policy.update(batch, stage.loss, step)))
            step += 1
            stopping = ctx.stop_asked()
            saving = stopping or saves_at(stage, step)
            evaluating = bool(stage.spec.eval_steps) and step % (stage.spec.eval_steps or 1) == 0
            while len(in_flight) > (0 if saving or evaluating or step == stage.total_steps else AHEAD):
                collect()
            if evaluating and step < stage.total_steps:
                ctx.on_log(log.write({"step": step, **evaluate_loss(stage, ctx)}))
            if saving:
                save_checkpoint(stage, ctx, step, log)
            if stopping and step < stage.total_steps:
                raise Stopped(f"{stage.name} at step {step} of {stage.total_steps}")
        if stage.eval_data is not None:
            ctx.on_log(log.write({"step": step, **evaluate_loss(stage, ctx)}))
        check_unmoved(stage.name, frozen, ctx.policy.frozen_digest())
        return finish(stage, ctx, log.last, time.monotonic() - began)
    finally:
        log.close()


def with_reference(stage: PreparedStage, reference: ReferenceFeed | None, step: int) -> Any:
    """The batch of a step, with the reference's log-probabilities where the loss wants them."""
    batch = stage.batch(step)
    return batch.with_columns(**reference.columns(stage.order[step])) if reference else batch


def evaluate_loss(stage: PreparedStage, ctx: TrainContext) -> dict[str, float]:
    """Loss and metrics on held-out rows, as `eval_*`, weighted by rows."""
    sums: dict[str, float] = {}
    rows = 0
    for chunk, held_out in stage.eval_batches():
        batch = held_out
        if ctx.reference is not None:
            batch = held_out.with_columns(**ctx.reference.eval_columns(chunk))
        metrics = ctx.policy.evaluate(batch, stage.loss)
        rows += len(chunk)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * len(chunk)
    return {f"eval_{name}": value / rows for name, value in sums.items()}


def restore(ctx: TrainContext, decision: Decision) -> int:
    """Load the checkpoint that a partial stage goes on from; returns the steps already done."""
    if decision.state != "partial" or decision.checkpoint is None or decision.manifest is None:
        return 0
    path = sound_checkpoint(decision.checkpoint, decision.manifest)
    ctx.policy.load_checkpoint(str(path))
    return int(decision.manifest.step or 0)


def save_checkpoint(stage: PreparedStage, ctx: TrainContext, step: int, log: MetricsLog) -> None:
    """Write a checkpoint whole, then remove those beyond `save_total_limit`."""
    path = ctx.directory / f"checkpoint-{step}"
    with new_directory(path, ctx.manifest("checkpoint", stage, step=step)) as aside:
        ctx.policy.save_checkpoint(str(aside))
        log.save(aside)
    for old in checkpoints(ctx.directory)[stage.spec.save_total_limit :]:
        shutil.rmtree(old)

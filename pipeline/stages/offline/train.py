"""The training loop that every offline stage goes through: batches in, verified steps, one artifact out."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from actors.algorithms import DpoLoss, KtoLoss
from pipeline.artifacts.identity import Decision, checkpoints
from pipeline.artifacts.manifest import Manifest, new_directory
from pipeline.stages.checks import check_first_step, check_unmoved
from pipeline.stages.context import (
    Applied,
    Saves,
    StageContext,
    Stopped,
    begins_step,
    finish,
    seconds_before,
    sound_checkpoint,
)
from pipeline.stages.grace import Grace
from pipeline.stages.metrics import MetricsLog
from pipeline.stages.prepared import PreparedStage

if TYPE_CHECKING:
    from actors.batches import Batch
    from actors.cluster import AgreedFuture
    from actors.trainer.remote import SharedBatch
    from pipeline.stages.offline.reference import ReferenceFeed


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
    ctx.policy.prepare(stage.spec.optim_spec(), stage.total_steps)
    step = restore(ctx, decision)
    frozen = ctx.policy.frozen_digest()
    log = MetricsLog(
        ctx.directory / "metrics.jsonl",
        resume_at=step,
        every=ctx.logging_steps,
        checkpoint=decision.checkpoint,
    )
    steps, saves = Steps(stage, ctx), Saves(stage, step)
    grace = Grace(ctx.stop, ctx.limits.limits.grace, ctx.note)
    ctx.time.begin(seconds_before(decision))
    try:
        if evaluates_at(stage, step) and not log.evaluated(step):
            evaluate(stage, ctx, step, log)  # A stop had cut this short.
        while step < stage.total_steps:
            if not steps.running and not steps.begin(step):
                if step > saves.step:
                    save_checkpoint(stage, ctx, step, log)
                raise Stopped(f"{stage.name} at step {step} of {stage.total_steps}")
            with grace.step(step + 1, partial(saved_before, stage, ctx, step, log, saves)):
                metrics = steps.end(step)
            step += 1
            saving, evaluating = saves.due(step), evaluates_at(stage, step)
            if not (saving or evaluating or step == stage.total_steps):
                steps.begin(step)
            check_and_log(stage, ctx, log, step, metrics)
            if evaluating:
                evaluate(stage, ctx, step, log)
            if saving:
                with grace.saving():
                    save_checkpoint(stage, ctx, step, log)
                saves.made(step)
        if stage.eval_data is not None:
            ctx.on_log(log.write({"step": step, **evaluate_loss(stage, ctx)}))
        check_unmoved(stage.name, frozen, ctx.policy.frozen_digest())
        return finish(stage, ctx, log.last)
    finally:
        log.close()


class Steps:
    """One step after the other on the ranks. The next one's rows are ready to be sent before the one that
    runs is back, which hides the driver's work behind theirs. Nothing is sent ahead: it could not be
    called back, and a stop would wait for it."""

    def __init__(self, stage: PreparedStage, ctx: TrainContext) -> None:
        self.stage, self.ctx = stage, ctx
        self.running: AgreedFuture[dict[str, float]] | None = None
        self._ready: dict[int, SharedBatch] = {}

    def begin(self, step: int) -> bool:
        """Send step `step` (from 0); False where a stop was asked for."""
        batch = self._batch(step)
        if not begins_step(self.stage, self.ctx.stop, step + 1):
            return False
        self.running = self.ctx.policy.update(batch, self.stage.loss, step)
        return True

    def end(self, step: int) -> dict[str, float]:
        """Metrics of step `step`, which runs, once it is back. Raises: as `AgreedFuture.result`."""
        assert self.running is not None
        if step + 1 < self.stage.total_steps:
            self._ready[step + 1] = self._batch(step + 1)
        running, self.running = self.running, None
        return running.result()

    def _batch(self, step: int) -> SharedBatch:
        if step in self._ready:
            return self._ready.pop(step)
        batch = with_reference(self.stage, self.ctx.reference, step)
        self.ctx.limits.saw("tokens", batch.n_tokens, self.stage.most_tokens)
        return self.ctx.policy.ready(batch)


def check_and_log(
    stage: PreparedStage, ctx: TrainContext, log: MetricsLog, step: int, metrics: dict[str, float]
) -> None:
    """Take in the metrics of step `step` (from 1).

    Raises:
        InvariantViolation: the first loss is not what it has to be.
    """
    metrics["epoch"] = round(stage.epoch(step), 4)
    if step == 1 and isinstance(stage.loss, DpoLoss | KtoLoss) and ctx.starts_as_reference:
        check_first_step(stage.name, stage.loss, metrics, ctx.dtype)
    line = log.add(step, metrics, final=step == stage.total_steps)
    ctx.on_step(step, metrics)
    if line:
        ctx.on_log(line)


def evaluates_at(stage: PreparedStage, step: int) -> bool:
    """True where the held-out loss is due after `step` steps. After the last one it is in any case, apart."""
    every = stage.spec.eval_steps
    return bool(every and stage.eval_data) and 0 < step < stage.total_steps and step % (every or 1) == 0


def evaluate(stage: PreparedStage, ctx: TrainContext, step: int, log: MetricsLog) -> None:
    """Log the held-out loss after `step` steps. A stop cuts it short; the resumed run does it anew."""
    with contextlib.suppress(CutEvaluation):
        ctx.on_log(log.write({"step": step, **evaluate_loss(stage, ctx, cut=True)}))


def with_reference(stage: PreparedStage, reference: ReferenceFeed | None, step: int) -> Batch:
    """The batch of a step, with the reference's log-probabilities where the loss wants them."""
    batch = stage.batch(step)
    return batch.with_columns(**reference.columns(stage.order[step])) if reference else batch


class CutEvaluation(Exception):
    """A stop was asked for in the middle of an evaluation."""


def evaluate_loss(stage: PreparedStage, ctx: TrainContext, *, cut: bool = False) -> dict[str, float]:
    """Loss and metrics on held-out rows, as `eval_*`, weighted by rows.

    Raises:
        CutEvaluation: with `cut`, when a stop is asked for meanwhile.
    """
    sums: dict[str, float] = {}
    rows = 0
    for chunk, held_out in stage.eval_batches():
        if cut and ctx.stop.asked():
            raise CutEvaluation
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


def saved_before(stage: PreparedStage, ctx: TrainContext, step: int, log: MetricsLog, saves: Saves) -> bool:
    """True once what was there before step `step` (from 0), which ranks work on, is on disk."""
    if step != saves.step:
        try:
            save_checkpoint(stage, ctx, step, log, in_flight=True)
        except Applied:
            return False
    return True


def save_checkpoint(
    stage: PreparedStage, ctx: TrainContext, step: int, log: MetricsLog, *, in_flight: bool = False
) -> None:
    """Write a checkpoint whole, then remove those beyond `save_total_limit`. `in_flight`: ranks work on the
    step after it.

    Raises:
        Applied: that step was applied already.
    """
    path = ctx.directory / f"checkpoint-{step}"
    with new_directory(path, ctx.manifest("checkpoint", stage, step=step)) as aside:
        if not in_flight:
            ctx.policy.save_checkpoint(str(aside))
        elif not ctx.policy.save_before(str(aside), step):
            raise Applied
        log.save(aside)
    for old in checkpoints(ctx.directory)[stage.spec.save_total_limit :]:
        shutil.rmtree(old)

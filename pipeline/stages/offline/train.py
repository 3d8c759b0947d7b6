"""The training loop that every offline stage goes through: batches in, verified steps, one artifact out."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.algorithms.dpo import DpoLoss
from actors.algorithms.kto import KtoLoss
from actors.errors import UserError
from pipeline.artifacts.identity import Decision, Identity, checkpoints
from pipeline.artifacts.manifest import MANIFEST, Manifest, new_directory, verify, versions, write_json
from pipeline.stages.checks import check_first_step, check_unmoved
from pipeline.stages.metrics import MetricsLog
from pipeline.stages.prepared import Prepared, PreparedStage
from pipeline.stages.specs.registry import RewardStage

if TYPE_CHECKING:
    from actors.cluster.worker_group import ActorGroup, Pending
    from pipeline.stages.offline.reference import ReferenceFeed

AHEAD = 2
"""Steps handed to the ranks before the first of them is back: the driver's work for a step (rows, the
object store, logging) then hides behind the ranks' own. More would only delay a stop."""


class Stopped(Exception):
    """The user asked to stop and everything is saved."""


@dataclass(kw_only=True)
class StageContext:
    """What every stage is given to work with, beside its data and loss."""

    host: ActorGroup
    role: str | None
    """Adapter that trains; None trains every parameter."""
    directory: Path
    identity: Identity
    dtype: str
    logging_steps: int
    starts_as_reference: bool
    stop_asked: Callable[[], bool]
    on_step: Callable[[int, dict[str, Any]], None]
    on_log: Callable[[dict[str, Any]], None]
    card: Callable[[Path, dict[str, Any]], None] = field(default=lambda path, metrics: None)

    def manifest(self, kind: str, stage: Prepared, **more: Any) -> Manifest:
        """A manifest of this stage's work."""
        return Manifest(
            type=kind,
            stage=stage.name,
            fingerprint=self.identity.fingerprint,
            inputs=self.identity.inputs,
            config=self.identity.config,
            data={"fingerprint": self.identity.data, "rows": stage.data.n_rows},
            seed=stage.seed,
            versions=versions(),
            **more,
        )


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
    ctx.host.call("prepare_training", ctx.role, stage.spec.optim_spec(), stage.total_steps, phase="load")
    step = restore(ctx, decision)
    frozen = ctx.host.call("frozen_digest", phase="call")[0]
    log = MetricsLog(
        ctx.directory / "metrics.jsonl",
        resume_at=step,
        every=ctx.logging_steps,
        checkpoint=decision.checkpoint,
    )
    flying: deque[tuple[int, Pending]] = deque()

    def land() -> None:
        number, pending = flying.popleft()
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
            flying.append((step, ctx.host.submit("update", batch, stage.loss, step, phase="update")))
            step += 1
            stopping = ctx.stop_asked()
            saving = stopping or (step % stage.spec.save_steps == 0 and step < stage.total_steps)
            evaluating = bool(stage.spec.eval_steps) and step % (stage.spec.eval_steps or 1) == 0
            while len(flying) > (0 if saving or evaluating or step == stage.total_steps else AHEAD):
                land()
            if evaluating and step < stage.total_steps:
                ctx.on_log(log.write({"step": step, **evaluate_loss(stage, ctx)}))
            if saving:
                save_checkpoint(stage, ctx, step, log)
            if stopping and step < stage.total_steps:
                raise Stopped(f"{stage.name} at step {step} of {stage.total_steps}")
        if stage.eval_data is not None:
            ctx.on_log(log.write({"step": step, **evaluate_loss(stage, ctx)}))
        check_unmoved(stage.name, frozen, ctx.host.call("frozen_digest", phase="call")[0])
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
        metrics = ctx.host.call("evaluate", batch, stage.loss, ctx.role, phase="evaluate")[0]
        rows += len(chunk)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * len(chunk)
    return {f"eval_{name}": value / rows for name, value in sums.items()}


def restore(ctx: TrainContext, decision: Decision) -> int:
    """Load the checkpoint that a partial stage goes on from; returns the steps already done."""
    if decision.state != "partial" or decision.checkpoint is None or decision.manifest is None:
        return 0
    path = sound_checkpoint(decision.checkpoint, decision.manifest)
    ctx.host.call("load_checkpoint", str(path), phase="restore")
    return int(decision.manifest.step or 0)


def sound_checkpoint(path: Path, manifest: Manifest) -> Path:
    """The checkpoint at `path`, if its files are what its manifest says.

    Raises:
        UserError: every file that is not.
    """
    damaged = verify(path, manifest)
    if damaged:
        raise UserError(
            [
                f"{path}: corrupt checkpoint, not resumed from: {problem}. Remove that "
                "directory to go on from the checkpoint before it (or from the stage's start), or start "
                "anew with --fresh"
                for problem in damaged
            ]
        )
    return path


def save_checkpoint(stage: PreparedStage, ctx: TrainContext, step: int, log: MetricsLog) -> None:
    """Write a checkpoint whole, then remove those beyond `save_total_limit`."""
    path = ctx.directory / f"checkpoint-{step}"
    with new_directory(path, ctx.manifest("checkpoint", stage, step=step)) as aside:
        ctx.host.call("save_checkpoint", str(aside), phase="save")
        log.save(aside)
    for old in checkpoints(ctx.directory)[stage.spec.save_total_limit :]:
        shutil.rmtree(old)


def finish(stage: Prepared, ctx: StageContext, last: dict[str, Any], seconds: float) -> Manifest:
    """Write the artifact, then the stage's manifest: only then is the stage done."""
    place = "model" if ctx.role is None else "adapter"
    kind = "reward_model" if isinstance(stage.spec, RewardStage) else place
    metrics = {name: value for name, value in last.items() if isinstance(value, int | float)}
    with new_directory(ctx.directory / place, ctx.manifest(kind, stage, metrics=metrics)) as aside:
        if ctx.role is None:
            ctx.host.call("save_model", str(aside), phase="save")
        else:
            ctx.host.call("save_adapter", ctx.role, str(aside), phase="save")
        ctx.card(aside, metrics)
    load = ctx.host.call_rank(0, "router_load", ctx.role, phase="call")
    if load is not None:
        write_json(ctx.directory / "router_load.json", {"load": np.asarray(load).tolist()})
    manifest = ctx.manifest(kind, stage, metrics=metrics, step=stage.total_steps, seconds=round(seconds, 3))
    made = ctx.directory / place
    inner = Manifest.model_validate_json((made / MANIFEST).read_text())
    manifest.files = {f"{place}/{name}": entry for name, entry in inner.files.items()}
    manifest.created = inner.created
    write_json(ctx.directory / MANIFEST, manifest.model_dump())
    return manifest

"""An online stage from its start or its last checkpoint to its artifact, around `RlLoop.step`."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from actors.errors import UserError
from pipeline.artifacts.identity import Decision, checkpoints
from pipeline.artifacts.manifest import Manifest, new_directory, write_json
from pipeline.stages.checks import check_unmoved
from pipeline.stages.context import (
    Applied,
    GivenUp,
    Saves,
    Stopped,
    begins_step,
    finish,
    seconds_before,
    sound_checkpoint,
)
from pipeline.stages.grace import Grace
from pipeline.stages.metrics import MetricsLog
from pipeline.stages.online.loop import RlContext, RlLoop, StepResult
from pipeline.stages.online.routing import Routing
from pipeline.stages.prepared import PreparedRl
from pipeline.stages.views import Scorer, frozen_digests

KEPT_SAMPLES = 4
"""Samples of each logged step that are kept for the report: of as many prompts, or, where prompts have
several samples each, so many of two prompts."""


def train_rl(stage: PreparedRl, ctx: RlContext, decision: Decision) -> Manifest:
    """Run an online stage to its end, from its last checkpoint if there is one.

    Raises:
        Stopped: after saving, when a stop was asked for.
        RunFailure: an actor failed beyond recovery, overran a deadline, or an invariant did not hold.
    """
    loop = RlLoop(stage, ctx)
    prepare(stage, ctx)
    step = restore(loop, decision)
    critics = [ctx.critic] if ctx.critic else []
    roles: list[Scorer] = [ctx.policy, ctx.reference, *critics, *ctx.reward_models.values()]
    frozen = frozen_digests(roles)
    ctx.sync.connect()
    ctx.sync.push(step)
    check_parser(stage, ctx)
    logs = StageLogs(stage, ctx, step, decision)
    log = logs.metrics
    interrupted, saves = False, Saves(stage, step)
    grace = Grace(ctx.stop, ctx.limits.limits.grace, ctx.note)
    ctx.time.begin(seconds_before(decision))
    try:
        while step < stage.total_steps:
            loop.rescale()
            if not begins_step(stage, ctx.stop, step + 1):
                if step > saves.step:
                    save_checkpoint(loop, step, log)
                raise Stopped(f"{stage.name} at step {step} of {stage.total_steps}")
            with grace.step(step + 1, partial(saved_before, loop, step, log, saves)):
                result = loop.step(step)
            step += 1
            logs.add(step, result)
            if saves.due(step):
                with grace.saving():
                    save_checkpoint(loop, step, log)
                saves.made(step)
        if ctx.elastic is not None:
            ctx.elastic.end()
        ctx.turns.to_policy()
        for host, digest in frozen_digests(roles).items():
            check_unmoved(stage.name, frozen[host], digest, host)
        return finish(stage, ctx, log.last)
    except (KeyboardInterrupt, GivenUp):
        interrupted = True
        raise
    finally:
        if not interrupted:  # Ranks in the middle of a step would answer when that is done.
            ctx.sync.close()
        logs.close()


class StageLogs:
    """Logs of an online stage's steps: metrics, some samples, routing."""

    def __init__(self, stage: PreparedRl, ctx: RlContext, step: int, decision: Decision) -> None:
        """`step`: steps already done, behind which the files go on."""
        self._stage, self._ctx = stage, ctx
        self.metrics = MetricsLog(
            ctx.directory / "metrics.jsonl",
            resume_at=step,
            every=ctx.logging_steps,
            checkpoint=decision.checkpoint,
        )
        self._samples, self._routing = (
            MetricsLog(ctx.directory / name, resume_at=step, every=1)
            for name in ("samples.jsonl", "routing.jsonl")
        )

    def add(self, step: int, result: StepResult) -> None:
        """Take in what came of step `step` (from 1), and tell the user."""
        stage, ctx = self._stage, self._ctx
        result.metrics["epoch"] = round(stage.epoch(step), 4)
        line = self.metrics.add(step, result.metrics, final=step == stage.total_steps)
        ctx.on_step(step, result.metrics)
        for note in result.notes:
            ctx.note(f"{stage.name} step {step}: {note}")
        if line:
            ctx.on_log(line)
            keep_samples(self._samples, step, result, stage.spec.num_generations)
            keep_routing(ctx.directory, self._routing, step, result.routing)

    def close(self) -> None:
        for log in (self.metrics, self._samples, self._routing):
            log.close()


def check_parser(stage: PreparedRl, ctx: RlContext) -> None:
    """Refuse a tool parser that doesn't fit the base, before the first sample.

    Raises:
        UserError: with what it lacks.
    """
    parsing = stage.conversing and stage.conversing.parsing
    if parsing and (problem := ctx.rollout.check_parser(parsing)):
        raise UserError(f"stages.{stage.name}.tool_parser: {problem}")


def prepare(stage: PreparedRl, ctx: RlContext) -> None:
    """Optimizers of policy and critic, over as many steps as each will take."""
    warm = stage.updates_before(stage.critic_warmup_steps)
    ctx.policy.prepare(stage.spec.optim_spec(), stage.total_updates - warm)
    settings = stage.spec.critic
    if ctx.critic is not None and settings is not None:
        shared = ctx.critic.shares_ranks_with(ctx.policy)
        optim = settings.critic_optim_spec(stage.spec.optim_spec())
        ctx.critic.prepare(optim, stage.total_updates, keep=shared)


def restore(loop: RlLoop, decision: Decision) -> int:
    """Load the checkpoint that a partial stage goes on from; returns the steps already done.

    Raises:
        UserError: it is damaged.
    """
    if decision.state != "partial" or decision.checkpoint is None or decision.manifest is None:
        return 0
    path = sound_checkpoint(decision.checkpoint, decision.manifest)
    loop.ctx.policy.load_checkpoint(str(path / "policy"))
    if loop.ctx.critic is not None:
        loop.ctx.critic.load_checkpoint(str(path / "critic"))
    loop.load_state(json.loads((path / "loop.json").read_text()))
    loop.prefetcher.load(path, loop.stage.data)
    return int(decision.manifest.step or 0)


def saved_before(loop: RlLoop, step: int, log: MetricsLog, saves: Saves) -> bool:
    """True once what was there before step `step` (from 0), which is being worked on, is on disk."""
    if step != saves.step:
        if loop.ctx.turns.alternate:  # What is to be saved may be parked.
            return False
        try:
            save_checkpoint(loop, step, log, in_flight=True)
        except Applied:
            return False
    return True


def save_checkpoint(loop: RlLoop, step: int, log: MetricsLog, *, in_flight: bool = False) -> None:
    """Write policy, critic, the loop's state and prefetched samples, then remove those beyond
    `save_total_limit`. `in_flight`: the step after it is being worked on.

    Raises:
        Applied: a part of that step was applied already.
    """
    ctx, stage = loop.ctx, loop.stage
    ctx.turns.to_policy()
    path = ctx.directory / f"checkpoint-{step}"
    updates = stage.updates_before(step)
    warm = stage.updates_before(stage.critic_warmup_steps)
    with new_directory(path, ctx.manifest("checkpoint", stage, step=step)) as aside:
        for name, view, done in (
            ("policy", ctx.policy, max(0, updates - warm)),
            ("critic", ctx.critic, updates),
        ):
            if view is not None:
                (aside / name).mkdir()
                if not in_flight:
                    view.save_checkpoint(str(aside / name))
                elif not view.save_before(str(aside / name), done):
                    raise Applied
        write_json(aside / "loop.json", loop.before if in_flight else loop.state())
        loop.prefetcher.save(aside, before=in_flight)
        log.save(aside)
    for old in checkpoints(ctx.directory)[stage.spec.save_total_limit :]:
        shutil.rmtree(old)


def keep_routing(directory: Path, log: MetricsLog, step: int, routing: Routing) -> None:
    """Keep a step's routing for the report; of the last one also the load of each expert in engines."""
    if row := routing.row(step):
        log.write(row)
    if routing.engines is not None:
        write_json(directory / "engine_load.json", {"step": step, "load": routing.engines.tolist()})


def keep_samples(log: MetricsLog, step: int, result: StepResult, n: int) -> None:
    """A few samples of a step; `n` is the number of samples of a prompt."""
    answers = result.prompts.columns.get("answer")
    prompts = KEPT_SAMPLES if n == 1 else 2
    kept = [p * n + k for p in range(prompts) for k in range(min(n, KEPT_SAMPLES))]
    for i in (i for i in kept if i < len(result.texts)):
        row = {"step": step, "prompt": result.prompts.texts[i], "completion": result.texts[i]}
        row["reward"] = float(result.rewards.values[i])
        log.write(row | ({"answer": answers[i]} if answers else {}))

"""The online loop: sample, reward, estimate, update, sync, and again. `RlLoop.step` is the whole of it.

- Version k of the policy has k steps behind it. The samples of step k come from version k - `staleness` (0:
  from version k), which every engine is proved to serve before the first of them is sampled.
- A step is a pure function of (policy, critic, optimizers, KL coefficient, prefetched samples) and its
  number: prompts, seeds and the order of minibatches follow from the run's seed. So a checkpoint holds just
  these, and a step that was lost with an actor or with the whole run is the same when it is done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.algorithms import ValueLoss
from actors.algorithms import checks as rl_checks
from actors.batches import Batch, Generations, trajectory_batch
from actors.cluster import Turns
from pipeline.data.tokens.prompts import PromptData
from pipeline.stages.context import StageContext
from pipeline.stages.online.dynamic_sampling import sampler_of
from pipeline.stages.online.estimates import Estimates, TokenScores
from pipeline.stages.online.objectives import objective_of
from pipeline.stages.online.rewards import RewardComputer, Rewards
from pipeline.stages.online.routing import Routing
from pipeline.stages.online.sampler import Prefetcher, SampledBatch
from pipeline.stages.prepared import PreparedRl
from pipeline.stages.views import Scorer, View, put

if TYPE_CHECKING:
    from actors.algorithms import Loss
    from actors.cluster import AgreedFuture
    from actors.rollout.pool import RolloutPool
    from actors.sync.weight_sync import SyncReport, WeightSync
    from pipeline.stages.online.elastic import Elastic
    from pipeline.stages.online.judge import JudgeEngines


@dataclass(kw_only=True)
class RlContext(StageContext):
    """Context of an online stage: a view for each role, the engines, and their sync."""

    reference: View
    critic: View | None
    reward_models: Mapping[str, Scorer]
    """By source."""
    rollout: RolloutPool
    sync: WeightSync
    tokenizer: Any
    judge: JudgeEngines | None = None
    """The run's own, where a reward asks it."""
    elastic: Elastic | None = None
    """Changes the number of engines between steps; None: it can't change."""
    turns: Turns = field(default_factory=Turns)
    """Of policy and engines, where they share a device."""
    replay_compare_steps: int = 0
    """Steps between those that also compute the policy's log-probabilities without router replay; 0: none."""


@dataclass
class Clock:
    """Seconds of one step, by part."""

    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began

    def metrics(self) -> dict[str, float]:
        parts = {f"time/{part}": value for part, value in self.seconds.items()}
        return parts | {"time/step": time.monotonic() - self.began}


@dataclass(frozen=True)
class StepResult:
    """Result of a step: its metrics, and its samples for the log."""

    metrics: dict[str, float]
    prompts: PromptData
    texts: list[str]
    rewards: Rewards
    notes: list[str]
    """Messages for the user: engines that passed nothing on, rewards that a default stands in for."""
    routing: Routing = field(default_factory=Routing)


class RlLoop:
    """The state that one step hands to the next, and the step."""

    def __init__(self, stage: PreparedRl, ctx: RlContext) -> None:
        self.stage, self.ctx, self.spec = stage, ctx, stage.spec
        self.rewards = RewardComputer(stage.spec, ctx.reward_models, ctx.directory, ctx.judge)
        self.sampler = sampler_of(stage, ctx.rollout, self.rewards, ctx.tokenizer, ctx.turns)
        together = stage.spec.sync.in_flight == "keep"
        self.prefetcher = Prefetcher(
            self.sampler.sample, stage.spec.staleness, stage.total_steps, together=together
        )
        self.objective = objective_of(stage.spec)
        self.kl = self.objective.kl_controller()
        self.idle = rl_checks.Idle()
        self.compared = False
        """An update of this run has been compared with log-probabilities that were computed before it."""
        self.num_tokens = 0
        self.before: dict[str, float] = self.state()
        """`state` before the present step."""

    def step(self, step: int) -> StepResult:
        """One RL step, from version `step` of the policy to version `step + 1`, served by every engine."""
        clock, self.before = Clock(), self.state()
        with clock("generate"):
            sampled = self.prefetcher.take(step)
        if self.ctx.turns.alternate:
            with clock("turn"):
                self.ctx.turns.to_policy()
        batch = trajectory_batch(sampled.prompts.token_ids, sampled.samples)
        longest = int(np.diff(sampled.samples.offsets).max(initial=1))
        self.ctx.limits.saw("tokens of a sample", longest, self.spec.max_completion_length)
        self.ctx.limits.saw("tokens", batch.n_tokens, batch.n_rows * self.stage.longest)
        asked, scoring = self.submit_scores(batch, step, sampled)
        with clock("rewards"):
            texts = self.sampler.texts(sampled.samples)
            rewards = scoring(texts)
        with clock("logprobs"):
            scores = TokenScores(**{name: one.result() for name, one in asked.items()})
        estimates = self.objective.estimate(batch, rewards.values, scores, self.kl.beta)
        checked = self.check(step, sampled, batch, scores, estimates)
        self.idle = self.idle.after(estimates.signal, rewards.values, estimates.kept)
        with clock("update"):
            updated = self.update(step, estimates, batch.n_rows)
        routing = self.routing(sampled, batch)
        with clock("wait"):
            self.before_sync()
        with clock("sync"):
            report = self.ctx.sync.push(step + 1)
        self.kl = self.kl.updated(estimates.kl or 0.0, batch.n_rows)
        self.num_tokens += batch.n_tokens
        metrics = {**updated, **rewards.metrics, **estimates.metrics, **checked, **sampled.metrics}
        metrics |= {"num_tokens": float(self.num_tokens), **lengths(sampled.samples), **report.metrics()}
        metrics |= {**routing.metrics(), **clock.metrics()}
        notes = [*sampled.notes, *rewards.notes, *withheld(report)]
        return StepResult(metrics, sampled.prompts, texts, rewards, notes, routing)

    # --- The parts of a step ----------------------------------------------------------------------

    def submit_scores(
        self, batch: Batch, step: int, sampled: SampledBatch
    ) -> tuple[dict[str, AgreedFuture[np.ndarray]], Callable[[list[str]], Rewards]]:
        """Ask all models about the samples, without waiting: token scores by field, and what turns the
        samples' texts into rewards.

        Only the policy replays the engines' experts, for the samples are its own. The reference routes for
        itself, as it would on samples of its own: so the divergence is from the reference as it is.
        """
        shared, ctx, temperature = put(batch), self.ctx, self.spec.temperature
        unrouted = shared if batch.experts is None else put(batch.unrouted())
        asked: dict[str, AgreedFuture[np.ndarray]] = {}
        if not self.objective.on_policy or not self.compared or batch.experts is not None:
            asked["old_logps"] = ctx.policy.token_logprobs(shared, temperature)
        if batch.experts is not None and ctx.replay_compare_steps and step % ctx.replay_compare_steps == 0:
            asked["unreplayed_logps"] = ctx.policy.token_logprobs(unrouted, temperature)
        if self.objective.needs_reference(step):
            asked["ref_logps"] = ctx.reference.token_logprobs(unrouted, temperature)
        if (k := self.objective.teacher_top_k) is not None:
            asked["teacher_top"] = ctx.reference.top_logprobs(unrouted, k, temperature)
        if ctx.critic is not None:
            asked["values"] = ctx.critic.values(unrouted)
        if sampled.rewards is not None:
            known = sampled.rewards
            return asked, lambda texts: known
        scored = self.rewards.submit(unrouted)
        return asked, lambda texts: self.rewards.result(
            scored, sampled.prompts, texts, sampled.samples, batch
        )

    def check(
        self, step: int, sampled: SampledBatch, batch: Batch, scores: TokenScores, estimates: Estimates
    ) -> dict[str, float]:
        """Everything that must hold before the weights move; metrics of what was looked at."""
        engine = batch.token_columns["engine_logps"]
        rl_checks.check_finite(engine_logps=engine, **estimates.finite, **vars(scores))
        stale = rl_checks.staleness(sampled.samples.drawn_versions, step, self.spec.staleness)
        if scores.old_logps is None:  # The update looks at the rest before the weights move.
            return {}
        if step == 0 and self.ctx.starts_as_reference and scores.ref_logps is not None:
            tolerance = rl_checks.KL_TOLERANCE[self.ctx.dtype]
            rl_checks.check_first_kl(scores.old_logps, scores.ref_logps, tolerance)
        # Engine and trainer must agree on tokens of the present version only: an older version had other
        # weights, and so gave other log-probabilities.
        now = stale == 0
        fresh = rl_checks.mismatch_metrics(engine[now], scores.old_logps[now])
        rl_checks.check_mismatch(fresh, *self.mismatch_limits())
        if scores.unreplayed_logps is not None:
            fresh |= rl_checks.mismatch_metrics(engine, scores.unreplayed_logps, "mismatch_unreplayed")
        if not self.spec.staleness:
            return fresh
        ages = {"staleness/mean": float(stale.mean()), "staleness/max": float(stale.max(initial=0))}
        return fresh | rl_checks.mismatch_metrics(engine, scores.old_logps) | ages

    def mismatch_limits(self) -> tuple[float, float]:
        """Of `mismatch/k3` and `mismatch/beyond_2x`."""
        tolerance = self.spec.mismatch_tolerance or rl_checks.MISMATCH_TOLERANCE[self.ctx.dtype]
        return tolerance, rl_checks.BEYOND_2X_TOLERANCE[self.ctx.dtype]

    def policy_loss(self) -> Loss:
        """With what has to hold before its optimizer step."""
        loss = self.objective.loss(self.kl.beta, self.ctx.dtype)
        if not self.objective.on_policy:
            return loss
        return loss.model_copy(update={"mismatch_limits": self.mismatch_limits()})

    def update(self, step: int, estimates: Estimates, samples: int) -> dict[str, float]:
        """Optimizer steps of policy and critic over the samples; means of their metrics."""
        first = self.stage.updates_before(step)
        learns = step >= self.stage.critic_warmup_steps
        asked: list[tuple[str, AgreedFuture[dict[str, float]]]] = []
        parts = self.objective.minibatches(estimates.batch.n_rows, samples, self.stage.seed, step)
        for number, rows in enumerate(parts, start=first):
            part = put(estimates.batch.select(rows))
            if learns:
                own = number - self.stage.updates_before(self.stage.critic_warmup_steps)
                asked.append(("", self.ctx.policy.update(part, self.policy_loss(), own)))
            if self.ctx.critic is not None:
                asked.append(("critic/", self.ctx.critic.update(part, self.value_loss(), number)))
        done = [(prefix, pending.result()) for prefix, pending in asked]
        if learns:
            at_reference = step == 0 and self.ctx.starts_as_reference
            self.objective.check_first(done[0][1], self.ctx.dtype, at_reference)
            self.compared = True
        return joined(done)

    def routing(self, sampled: SampledBatch, batch: Batch) -> Routing:
        """Routing of this step, in the engines and in the trainer."""
        policy = self.ctx.policy
        agreement = None if batch.experts is None else policy.route_agreement()
        return Routing(policy.router_load(), sampled.expert_load, agreement)

    def before_sync(self) -> None:
        """Let the engines finish the samples of later steps, so that all of these come from one version."""
        if self.spec.sync.in_flight == "wait":
            self.prefetcher.settle()

    def rescale(self) -> None:
        """Take up what was asked of the number of engines, between two steps."""
        if self.ctx.elastic is not None:
            self.ctx.elastic.between_steps(self.prefetcher.settle)

    def value_loss(self) -> ValueLoss:
        critic = self.spec.critic
        assert critic is not None
        return critic.value_loss()

    # --- What a checkpoint holds beside policy and critic -------------------------------------------

    def state(self) -> dict[str, float]:
        reasons = {f"idle_{reason}": steps for reason, steps in self.idle.reasons.items()}
        return {"beta": self.kl.beta, "idle": self.idle.steps, "num_tokens": self.num_tokens, **reasons}

    def load_state(self, state: dict[str, float]) -> None:
        self.kl = replace(self.kl, beta=float(state["beta"]))
        reasons = {name.removeprefix("idle_"): int(n) for name, n in state.items() if "idle_" in name}
        self.idle = rl_checks.Idle(int(state["idle"]), reasons)
        self.num_tokens = int(state["num_tokens"])


def withheld(report: SyncReport) -> list[str]:
    """Messages on engines that did not pass a version on."""
    return [
        f"rollout-{rank} did not pass new weights on to engines below it: others do so now"
        for rank in report.withheld
    ]


FIRST_ONLY = ("ratio/beyond", "ratio/beyond_tenth")
"""Metrics that say something of the first update of a step only, where they are checked."""


def joined(done: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """Means over optimizer steps; the critic's share a prefix where they have a namesake."""
    own = {"critic/value_loss": "value_loss", "critic/value_clip_ratio": "value_clip_ratio"}
    values: dict[str, list[float]] = {}
    for prefix, metrics in done:
        for name, value in metrics.items():
            key = f"{prefix}{name}"
            values.setdefault(own.get(key, key), []).append(value)
    dropped = {"num_tokens", "critic/num_tokens", "step_seconds", "critic/step_seconds", *FIRST_ONLY}
    means = {name: sum(all_) / len(all_) for name, all_ in values.items() if name not in dropped}
    return means | {name: max(values[name]) for name in ("ratio/max_deviation",) if name in values}


def lengths(samples: Generations) -> dict[str, float]:
    """TRL's names for how long the completions are, and how many were cut at the limit; of conversations also
    their turns, and calls of tools per sample."""
    each = samples.drawn_lengths
    cut = np.mean([reason != "stop" for reason in samples.finish_reasons])
    found = {
        "completions/mean_length": float(each.mean()),
        "completions/min_length": float(each.min()),
        "completions/max_length": float(each.max()),
        "completions/clipped_ratio": float(cut),
    }
    if samples.episodes is None:
        return found
    turns = [one.turns for one in samples.episodes]
    calls = sum(len(m.get("tool_calls") or ()) for one in samples.episodes for m in one.messages)
    found |= {"turns/mean": float(np.mean(turns)), "turns/max": float(max(turns))}
    return found | {"tools/call_frequency": calls / len(turns)}

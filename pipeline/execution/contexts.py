"""Contexts of stages: the views of their roles, their reference, their way to report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.cluster import MeasuredLimits
from pipeline.artifacts.weights import Weights
from pipeline.evaluation.pairs import Scorer
from pipeline.execution.hosts import adapter_name, critic_name
from pipeline.execution.slots import slots_of
from pipeline.execution.stage_card import write_stage_card
from pipeline.roles import CRITIC, JUDGE, POLICY, REFERENCE, REWARD, ROLLOUT
from pipeline.stages.context import Stops, WorkTime
from pipeline.stages.offline.reference import ReferenceFeed
from pipeline.stages.offline.train import TrainContext
from pipeline.stages.online.elastic import Elastic
from pipeline.stages.online.loop import RlContext
from pipeline.stages.online.probes import probes_of
from pipeline.stages.prepared import PreparedRl
from pipeline.stages.views import View

if TYPE_CHECKING:
    from pipeline.execution.fleet import Fleet
    from pipeline.planning.nodes import Node
    from pipeline.stages.online.judge import JudgeEngines


@dataclass(frozen=True)
class Events:
    """Callbacks by which a stage tells the run how it goes, and asks whether to stop."""

    on_step: Callable[[int, dict[str, Any]], None]
    on_log: Callable[[dict[str, Any]], None]
    stop: Stops
    time: WorkTime
    note: Callable[[str], None]


class Contexts:
    """Hands each stage of a run its context; the processes are the fleet's."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.config = fleet, fleet.config

    def train_context(self, node: Node, reference: ReferenceFeed | None, events: Events) -> TrainContext:
        """The policy with this stage's own adapter, started from its input, and the rest of the context."""
        return TrainContext(**self._common(node, events, self._policy(node)), reference=reference)

    def rl_context(self, node: Node, stage: PreparedRl, events: Events, tokenizer: Any) -> RlContext:
        """A view for every role of an online stage, the engines, and the sync between policy and engines."""
        from actors.rollout.pool import RolloutPool
        from actors.sync.engine_set import EngineSet
        from actors.sync.spec import backends_for
        from actors.sync.weight_sync import WeightSync, load_base

        turns, wanted = self.fleet.turns, stage.spec.sync
        rollout = self.fleet.engine_processes()
        slots = slots_of(node.start, self.config.model) if wanted.payload == "lora" else None
        # The engines read the base while the ranks do, unless both want the same memory for it.
        loading = None if turns.alternate else load_base(rollout, node.start.base, slots)
        policy = self._policy(node)
        probes = probes_of(stage.data.token_ids, wanted, stage.sampling.max_tokens)
        roles = self.config.roles
        backends = backends_for(roles.gpus_of(POLICY), roles.gpus_of(ROLLOUT), turns.alternate)
        engines = EngineSet(rollout)
        sync = WeightSync(
            policy.workers.group,
            engines,
            wanted,
            node.start.base,
            policy.role,
            probes,
            backends,
            loading,
            turns,
            slots,
        )
        pool = RolloutPool(engines, in_flight=wanted.in_flight == "keep")
        return RlContext(
            **self._common(node, events, policy),
            reference=self._reference(node),
            critic=self._critic(node, node.critic) if node.critic is not None else None,
            reward_models={
                source: self._view(REWARD, node, model, source) for source, model in node.rewards.items()
            },
            judge=self._judge(node.judge) if node.judge is not None else None,
            rollout=pool,
            sync=sync,
            tokenizer=tokenizer,
            turns=turns,
            elastic=None if turns.alternate else Elastic(sync, self.fleet.directory.path, events.note),
            replay_compare_steps=self.config.model.moe.router_replay_compare_steps,
        )

    def _common(self, node: Node, events: Events, policy: View) -> dict[str, Any]:
        return {
            "policy": policy,
            "directory": node.directory,
            "identity": node.identity,
            "dtype": self.config.model.dtype,
            "logging_steps": self.config.logging.logging_steps,
            "starts_as_reference": node.reference == node.start,
            "stop": events.stop,
            "time": events.time,
            "limits": self.fleet.measured or MeasuredLimits(self.config.limits),
            "on_step": events.on_step,
            "on_log": events.on_log,
            "note": events.note,
            "card": lambda path, metrics: write_stage_card(self.config, node, path, metrics),
        }

    def _view(self, role: str, node: Node, weights: Weights, model: str) -> View:
        """A role that doesn't train: the weights of `model`, on the processes that serve the role."""
        host = self.fleet.ready_host(self.config.roles.server_of(role), node, weights)
        return host.view(weights, adapter_name(model))

    def _reference(self, node: Node) -> View:
        """The reference of a stage that has one."""
        source = self.config.reference_of(node.name)
        assert node.reference is not None
        assert source is not None
        return self._view(REFERENCE, node, node.reference, source)

    def _critic(self, node: Node, start: Weights) -> View:
        """An adapter of its own with a value head, from the weights that `critic_init` names."""
        source = self._view(CRITIC, node, start, self.config.critic_init_of(node.name) or node.init)
        name = critic_name(node.name)
        critic = _start_adapter(source, name)
        critic.workers.add_head(name)
        return critic

    def _judge(self, weights: Weights) -> JudgeEngines:
        """The judge's engines with its weights, and its own tokenizer."""
        from actors.models.base.loading import load_tokenizer, resolve_base
        from actors.models.facts import max_positions
        from actors.models.turn_ends import turn_ends
        from actors.rollout.spec import positions_of
        from pipeline.evaluation.held_out import loaded_pool
        from pipeline.stages.online.judge import JudgeEngines

        model = self.config.judge_settings(weights.adapter or weights.base)
        resolved = resolve_base(model).checked()
        assert resolved.config is not None
        asked = self.config.roles.judge.engine.max_model_len
        positions = positions_of(asked, max_positions(resolved.config))
        tokenizer = load_tokenizer(model)
        pool = loaded_pool(self.fleet.engines(JUDGE), weights, JUDGE)
        where = f"judge {weights.fingerprint}"
        return JudgeEngines(pool, tokenizer, turn_ends(tokenizer, weights.base), positions, where)

    def _policy(self, node: Node) -> View:
        """A new adapter of this stage, equal to the weights that it starts from; without LoRA the base."""
        host = self.fleet.ready_host(POLICY, node, node.start)
        if self.config.model.lora is None:
            host.holds = node.identity.fingerprint
            return View(host.workers, None)
        name = adapter_name(node.name)
        policy = _start_adapter(host.view(node.start, adapter_name(node.init)), name)
        if node.spec.makes == "reward_model":
            host.workers.add_head(name, "normal")
        host.adapters[name] = node.identity.fingerprint
        return policy

    def pair_scorer(self, node: Node, made: Weights) -> Scorer:
        """Scores of pairs by the reward model that a stage has made, on the policy's ranks."""
        host = self.fleet.ready_host(POLICY, node, made)
        view = host.view(made, adapter_name(node.name))
        return lambda batch: view.scores(batch, phase="evaluate").result()

    def reference_feed(self, node: Node) -> ReferenceFeed | None:
        """Reference log-probabilities of an offline stage, already being computed; None: it needs none."""
        feed = self.fleet.feeds.get(node.name)
        if feed is not None and not feed.cached:
            feed.start(self._reference(node))
        return feed


def _start_adapter(source: View, name: str) -> View:
    """A trainable adapter `name`, equal to `source`, or fresh on the bare base."""
    if source.role is None:
        source.workers.add_adapter(name)
    else:
        source.workers.copy_adapter(source.role, name, trainable=True)
    return View(source.workers, name)

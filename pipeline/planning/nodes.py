"""Nodes of a run's graph: a stage with its start, what it is compared by, and the decision to run it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import UserError
from pipeline.artifacts.identity import CODE, Decision, Identity, Length, decide, flat, identity_config
from pipeline.artifacts.run_directory import RunDirectory
from pipeline.artifacts.user_code import code_digests, file_digests, unread_code
from pipeline.artifacts.weights import Weights
from pipeline.evaluation.held_out import EvalSet
from pipeline.stages.prepared import Prepared
from pipeline.stages.specs.registry import AnyStage

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig


@dataclass
class Node:
    """One stage: what it starts from, what it needs, and whether it has to run."""

    name: str
    spec: AnyStage
    prepared: Prepared
    init: str
    start: Weights
    reference: Weights | None
    identity: Identity
    decision: Decision
    directory: Path
    rewards: dict[str, Weights] = field(default_factory=dict)
    """Reward models that an online stage asks, by their source."""
    critic: Weights | None = None
    """Start of PPO's critic."""
    judge: Weights | None = None
    """Model that the run's own engines judge samples with."""
    unread_code: list[str] = field(default_factory=list)
    """Reward functions whose code can't be read."""

    @property
    def kind(self) -> str:
        """Type of the stage: sft, reward, dpo, ppo, ..."""
        return self.spec.type

    @property
    def data_notes(self) -> list[str]:
        """Lines on its rows: how many, and each reason for which some were left out or cut; and on code that
        can't be read."""
        stage = self.prepared
        notes = []
        for what, data in (("", stage.data), (" (held out)", stage.eval_data)):
            if data is None:
                continue
            cut = f", {data.stats.truncated:,} sequences cut at max_length" if data.stats.truncated else ""
            notes.append(f"{self.name}{what}: {data.n_rows:,} rows, {data.stats.tokens:,} tokens{cut}")
        notes += [unread_code(self.name, source) for source in self.unread_code]
        return notes + remarks_on_data(self.prepared)

    @property
    def pending(self) -> bool:
        return self.decision.state != "fresh"


def use_of_rows(stage: Prepared) -> str:
    """Share of its rows that a stage trains on, in words, or how often it goes through all of them."""
    order, steps = stage.order, stage.total_steps
    rows, used = order.n_rows, steps * order.batch_size
    what = "prompts" if stage.online else "rows"
    said = f"{stage.name}: {_count(steps, 'step')} x {order.batch_size:,}"
    if used < rows:
        return f"{said} = {used:,} of {rows:,} {what} ({100 * used / rows:.2g} %)"
    return f"{said}, {_count(round(stage.epoch(steps), 2), 'pass', 'passes')} over all {rows:,} {what}"


def _count(number: float, one: str, more: str = "") -> str:
    return f"{number:,g} {one if number == 1 else more or one + 's'}"


def remarks_on_data(stage: Prepared) -> list[str]:
    """Remarks on a stage's rows for the user: the share of them that its steps take where that is not all,
    those left out, and those that went through a template before they came here."""
    notes = []
    if stage.total_steps * stage.order.batch_size < stage.order.n_rows:
        notes.append(use_of_rows(stage))
    for what, data in (("", stage.data), (" (held out)", stage.eval_data)):
        if data is None:
            continue
        if data.stats.rendered:
            notes.append(
                f"{stage.name}{what}: rows of text that hold turns of the chat template already: "
                f"{data.stats.rendered:,}; they are trained as they stand"
            )
        if data.skipped.counts:
            notes.append(f"{stage.name}{what}: left out {data.skipped.summary()}")
            notes += [f"  {row}" for row in data.skipped.listing]
    if stage.online and stage.order.batch_size > stage.order.n_rows:
        notes.append(
            f"{stage.name}: {stage.order.n_rows:,} prompts, and a step samples {stage.order.batch_size:,} "
            f"(batch_size x steps_per_generation / num_generations): some come more than once in each step, "
            "with other samples"
        )
    return notes


@dataclass(frozen=True)
class PairEvaluation:
    """A reward stage whose held-out pairs are to be scored."""

    node: Node
    key: str
    done: bool


@dataclass
class Graph:
    """All stages in order, the weights by name, and the evaluations that the config asks for."""

    nodes: list[Node]
    weights: dict[str, Weights]
    tokenizer: Any
    template_date: datetime | None = None
    """Date that the chat template is given, where it asks for one."""
    lora_targets: str | None = None
    """Table of what LoRA trains."""
    untested: bool = False
    """The base's architecture has no row in the table; the user allowed that."""
    held_out: EvalSet | None = None
    evaluations: dict[str, str] = field(default_factory=dict)
    """Model name -> key of its evaluation."""
    evaluations_pending: bool = False
    pair_evaluations: list[PairEvaluation] = field(default_factory=list)
    """Reward stages with held-out pairs."""

    @property
    def pending(self) -> list[Node]:
        return [node for node in self.nodes if node.pending]

    def evaluations_only(self, names: list[str]) -> Graph:
        """The same graph with nothing to train.

        Raises:
            UserError: a model to evaluate has no finished stage behind it.
        """
        problems = [
            f"eval.models: {node.name} is not there yet ({node.decision.says}); `raylign run` makes it"
            for node in self.pending
            if node.name in names
        ]
        if problems:
            raise UserError(problems)
        made = [found for found in self.pair_evaluations if not found.node.pending]
        return replace(self, nodes=[], pair_evaluations=made)


def make_node(
    config: RunConfig, directory: RunDirectory, weights: dict[str, Weights], prepared: Prepared
) -> Node:
    """Identity and decision of one stage."""
    name, spec = prepared.name, prepared.spec
    init, compared, critic_init = config.init_of(name), config.reference_of(name), config.critic_init_of(name)
    reference = None if compared is None else weights[compared]
    rewards = reward_models(config, name, weights)
    critic = None if critic_init is None else weights[critic_init]
    read = {init: weights[init]}
    if reference is not None:
        read["reference"] = reference
    if critic is not None:
        read["critic"] = critic
    judge = judge_of(config, spec)
    if judge is not None:
        read["judge"] = judge
    read |= {f"reward {source}": model for source, model in rewards.items()}
    inputs = {name: model.fingerprint for name, model in read.items()}
    identity = stage_identity(config, spec, inputs, prepared.data.fingerprint, prepared.seed)
    identity = with_prepared(identity, prepared)
    earlier = {name: model.earlier for name, model in read.items() if model.earlier}
    length = Length(prepared.total_steps, spec.needs_length)
    identity = replace(identity, earlier_inputs=earlier, length=length)
    code = identity.config.get(CODE, {})
    path = directory.stage(name)
    decision = decide(path, identity)
    return Node(
        name=name,
        spec=spec,
        prepared=prepared,
        init=init,
        start=weights[init],
        reference=reference,
        identity=decision.identity or identity,
        decision=decision,
        directory=path,
        rewards=rewards,
        critic=critic,
        judge=judge,
        unread_code=[
            source for source in [*reward_functions(spec), *environments(spec)] if source not in code
        ],
    )


def with_prepared(identity: Identity, prepared: Prepared) -> Identity:
    """An identity with what only the prepared stage knows of its result, where that is not what earlier
    versions did: a stage that was made before a thing was asked stays finished where the answer is theirs."""
    more: dict[str, Any] = {}
    if prepared.online and prepared.added_ends:
        more["turn_ends"] = list(prepared.added_ends)  # Without any, the base alone says what ends a turn.
    if prepared.online and prepared.order.filled:
        more["last_step"] = "filled"  # It was a smaller step.
    return replace(identity, config=identity.config | more, chosen=identity.chosen | more.keys())


def stage_identity(
    config: RunConfig, spec: AnyStage, inputs: dict[str, str], data: str, seed: int
) -> Identity:
    """Identity of a stage's work, by its settings, the model's, the code of its reward functions, and the
    fingerprints of what it reads."""
    chosen = frozenset(flat(_settings(config, spec, exclude_defaults=True)))
    settings = _settings(config, spec)
    # No empty entry: manifests of stages without functions stay as earlier versions wrote them.
    functions = [*reward_functions(spec), *environments(spec)]
    if code := code_digests(functions) | file_digests(reward_files(spec)):
        settings[CODE] = code
    return Identity(settings, inputs, data, seed, chosen)


def _settings(config: RunConfig, spec: AnyStage, exclude_defaults: bool = False) -> dict[str, Any]:
    """Settings of a stage and of the model that count in its identity."""
    model = config.model.model_dump(
        mode="json",
        exclude={"base", "gradient_checkpointing", "attn_implementation", "allow_untested"},
        exclude_defaults=exclude_defaults,
    )
    return identity_config(spec.model_dump(mode="json", exclude_defaults=exclude_defaults), model)


def reward_functions(spec: AnyStage) -> list[str]:
    """Functions of the user's that a stage is rewarded by, as `module:function`."""
    return [one.function for one in spec.rewards if one.function is not None] if spec.online else []


def reward_files(spec: AnyStage) -> list[str]:
    """Files that a stage's rewards read."""
    return [one.file for one in spec.rewards if one.file is not None] if spec.online else []


def environments(spec: AnyStage) -> list[str]:
    """Environments, agents and tools of the user's, as `module:name`."""
    return spec.user_code if spec.online else []


def reward_models(config: RunConfig, name: str, weights: dict[str, Weights]) -> dict[str, Weights]:
    """Reward models that a stage asks: results of earlier stages, or directories on the run's base."""
    base = weights["base"].base
    return {
        source: weights[stage] if stage is not None else Weights.on_disk(base, source, source)
        for source, stage in config.reward_models_of(name).items()
    }


def judge_of(config: RunConfig, spec: AnyStage) -> Weights | None:
    """Model that the run's own engines judge a stage's samples with; None: there is none.

    Raises:
        UserError: it can't be found.
    """
    if not spec.judge_models:
        return None
    from actors.models.base.loading import locate_base

    base, adapter = locate_base(config.judge_settings(spec.judge_models[0]))
    return Weights.on_disk(base, adapter, base, *([adapter] if adapter else []))


def result_of(config: RunConfig, node: Node) -> Weights:
    """Weights of a stage once it has run."""
    if config.model.lora is None:
        return Weights(str(node.directory / "model"), None, node.identity.fingerprint)
    return Weights(node.start.base, str(node.directory / "adapter"), node.identity.fingerprint)

"""The graph of a run, read and decided before any actor works: data, identities, what is still to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.engine_spec import positions_of
from actors.errors import UserError
from actors.models.architectures import ARCHITECTURES
from pipeline.architecture import architecture_problems
from pipeline.artifacts import model_fingerprint
from pipeline.data.records import Records, load_records
from pipeline.graph import Decision, Identity, decide, identity_config
from pipeline.rundir import RunDirectory
from pipeline.stages.evaluate import (
    EvalSet,
    Weights,
    check_columns,
    eval_key,
    find_scorer,
    finished,
    read_eval_set,
)
from pipeline.stages.pairs import pair_key
from pipeline.stages.prepared import Prepared, StageRecords, prepare, read_records
from pipeline.stages.reward_sources import (
    reward_base_problems,
    reward_column_problems,
    reward_source_problems,
)
from pipeline.stages.room import held_out_problems, sample_problems
from pipeline.stages.spec import PpoStage, ReferencedStage, RewardStage, RlStage, StageSpec
from pipeline.trackers import tracker_problems

if TYPE_CHECKING:
    from actors.models.facts import BaseFacts
    from pipeline.config.schema import RunConfig


@dataclass
class Node:
    """One stage: what it starts from, what it needs, and whether it has to run."""

    name: str
    spec: StageSpec
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
    """Where PPO's critic starts."""

    @property
    def kind(self) -> str:
        """Type of the stage: sft, reward, dpo, ppo, ..."""
        return str(getattr(self.spec, "type", ""))

    @property
    def data_notes(self) -> list[str]:
        """What became of its rows: how many, and each reason for which some were left out or cut."""
        stage = self.prepared
        notes = []
        for what, data in (("", stage.data), (" (held out)", stage.eval_data)):
            if data is None:
                continue
            cut = f", {data.stats.truncated:,} sequences cut at max_length" if data.stats.truncated else ""
            notes.append(f"{self.name}{what}: {data.n_rows:,} rows, {data.stats.tokens:,} tokens{cut}")
            if data.skipped.counts:
                notes.append(f"{self.name}{what}: left out {data.skipped.summary()}")
                notes += [f"  {row}" for row in data.skipped.listing]
        return notes

    @property
    def pending(self) -> bool:
        return self.decision.state != "fresh"


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


@dataclass(frozen=True)
class RunRecords:
    """Every row that a run reads."""

    stages: dict[str, StageRecords]
    held_out: Records | None


def read_rows(config: RunConfig, until: str | None = None) -> RunRecords:
    """Read all data of a run; needs neither a tokenizer nor Ray, so nothing is started for bad data.

    Raises:
        UserError: everything wrong with data, trackers and scorer, from all stages at once.
    """
    problems = tracker_problems(config.logging.report_to)
    problems += reward_source_problems(config, up_to(config, until))
    stages: dict[str, StageRecords] = {}
    held_out = None
    for name in up_to(config, until):
        try:
            stages[name] = read_records(config, name)
            train = stages[name].train
            problems += reward_column_problems(name, config.stages[name], train.columns, len(train))
        except UserError as error:
            problems += [f"stages.{name}: {problem}" for problem in error.problems]
    if config.eval is not None:
        try:
            find_scorer(config.eval.metric)
            held_out = load_records(
                config.eval.data, "prompt", seed=config.seed, max_rows=config.eval.max_rows
            )
            check_columns(config.eval, held_out)
        except UserError as error:
            problems += [p if p.startswith("eval") else f"eval.data: {p}" for p in error.problems]
    if problems:
        raise UserError(problems)
    return RunRecords(stages, held_out)


def up_to(config: RunConfig, until: str | None) -> list[str]:
    """Stages in order, ending with `until` where it is given."""
    names = list(config.stages)
    return names[: names.index(until) + 1] if until else names


def read_graph(
    config: RunConfig,
    directory: RunDirectory,
    records: RunRecords,
    startup: dict[str, float],
    facts: Callable[[], BaseFacts],
) -> Graph:
    """Tokenise every stage's rows and decide what each stage needs. `facts` waits for those of the base.

    Raises:
        UserError: everything wrong with the base, the template and the lengths of rows.
    """
    from actors.models.loading import load_tokenizer, locate_base

    began = time.monotonic()
    problems: list[str] = []
    graph = None
    try:
        local, adapter = locate_base(config.model)
        prints = [model_fingerprint(local)] + ([model_fingerprint(adapter)] if adapter else [])
        weights = {"base": Weights(local, adapter, "-".join(prints))}
        tokenizer = load_tokenizer(config.model)
        startup["tokenizer"] = round(time.monotonic() - began, 2)
        graph = tokenised(config, directory, weights, tokenizer, records)
        startup["tokens"] = round(time.monotonic() - began - startup["tokenizer"], 2)
    except UserError as error:
        problems = error.problems
    began = time.monotonic()
    base = facts()
    startup["wait for what the base is"] = round(time.monotonic() - began, 2)
    problems = [*base.problems, *(problem for problem in problems if problem not in base.problems)]
    if graph is not None:
        problems += base.problems or reward_base_problems(config, records.stages)
        if base.model_type is not None:
            problems += architecture_problems(config, base.model_type, records.stages)
        positions = positions_of(config.roles.rollout.engine.max_model_len, base.max_positions)
        problems += [problem for node in graph.nodes for problem in sample_problems(node.prepared, positions)]
        problems += held_out_problems(graph.held_out, positions) if graph.held_out is not None else []
    if problems or graph is None:
        raise UserError(problems)
    graph.lora_targets = base.lora_targets
    graph.untested = base.model_type not in ARCHITECTURES
    return graph


def tokenised(
    config: RunConfig,
    directory: RunDirectory,
    weights: dict[str, Weights],
    tokenizer: Any,
    records: RunRecords,
) -> Graph:
    """The graph, by the data and by what is in the run directory.

    Raises:
        UserError: everything wrong with the template and the lengths of rows.
    """
    nodes = read_nodes(config, directory, weights, tokenizer, records)
    graph = Graph(nodes, weights, tokenizer)
    graph.pair_evaluations = pair_evaluations(graph, directory.path / "eval")
    if config.eval is not None:
        graph.held_out = read_eval_set(config.eval, tokenizer, config.seed, records.held_out)
        for name in config.eval_models():
            if name in weights:
                key = eval_key(weights[name], graph.held_out, config.eval, config.seed)
                graph.evaluations[name] = key
                graph.evaluations_pending |= finished(directory.path / "eval", name, key) is None
    return graph


def pair_evaluations(graph: Graph, directory: Path) -> list[PairEvaluation]:
    """Reward stages with held-out pairs, and whether these were scored already."""
    found = []
    for node in graph.nodes:
        if isinstance(node.spec, RewardStage) and node.prepared.eval_data is not None:
            key = pair_key(graph.weights[node.name], node.prepared.eval_data)
            found.append(PairEvaluation(node, key, finished(directory, node.name, key) is not None))
    return found


def read_nodes(
    config: RunConfig,
    directory: RunDirectory,
    weights: dict[str, Weights],
    tokenizer: Any,
    records: RunRecords,
) -> list[Node]:
    """Nodes in order; adds each stage's result to `weights`."""
    nodes: list[Node] = []
    problems: list[str] = []
    for name, rows in records.stages.items():
        try:
            prepared = prepare(config, name, tokenizer, rows)
        except UserError as error:
            problems += [
                problem if name in problem else f"stages.{name}: {problem}" for problem in error.problems
            ]
            continue
        if problems:
            continue
        node = make_node(config, directory, weights, prepared)
        nodes.append(node)
        weights[name] = result_of(config, node)
    if problems:
        raise UserError(problems)
    return nodes


def make_node(
    config: RunConfig, directory: RunDirectory, weights: dict[str, Weights], prepared: Prepared
) -> Node:
    """Identity and decision of one stage."""
    name, spec = prepared.name, prepared.spec
    init = config.init_of(name)
    has_reference = isinstance(spec, ReferencedStage | RlStage)
    reference = weights[config.reference_of(name)] if has_reference else None
    rewards = reward_models(config, name, weights) if isinstance(spec, RlStage) else {}
    critic = weights[config.critic_init_of(name)] if isinstance(spec, PpoStage) else None
    inputs = {init: weights[init].fingerprint}
    if reference is not None:
        inputs["reference"] = reference.fingerprint
    if critic is not None:
        inputs["critic"] = critic.fingerprint
    inputs |= {f"reward {source}": model.fingerprint for source, model in rewards.items()}
    model = config.model.model_dump(
        mode="json", exclude={"base", "gradient_checkpointing", "attn_implementation", "allow_untested"}
    )
    identity = Identity(
        identity_config(spec.model_dump(mode="json"), model), inputs, prepared.data.fingerprint, prepared.seed
    )
    path = directory.stage(name)
    decision = decide(path, identity)
    return Node(
        name, spec, prepared, init, weights[init], reference, identity, decision, path, rewards, critic
    )


def reward_models(config: RunConfig, name: str, weights: dict[str, Weights]) -> dict[str, Weights]:
    """Reward models of an online stage: results of earlier stages, or directories on the run's base."""
    base = weights["base"].base
    return {
        source: weights[stage] if stage is not None else Weights(base, source, model_fingerprint(source))
        for source, stage in config.reward_models_of(name).items()
    }


def result_of(config: RunConfig, node: Node) -> Weights:
    """Where a stage's weights are once it has run."""
    if config.model.lora is None:
        return Weights(str(node.directory / "model"), None, node.identity.fingerprint)
    return Weights(node.start.base, str(node.directory / "adapter"), node.identity.fingerprint)

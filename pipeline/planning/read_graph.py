"""Reading a run: its rows, the tokens of each stage, and the graph that these make with what is on disk.

No actor works yet: what is wrong with data, base and lengths is found here, all of it at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import UserError, attempt
from actors.models.facts import ARCHITECTURES
from actors.models.turn_ends import turn_ends, vocab_size
from pipeline.artifacts.run_directory import RunDirectory
from pipeline.artifacts.weights import Weights
from pipeline.data.reading.records import Records, load_records
from pipeline.data.tokens.template_date import keep_date
from pipeline.evaluation.held_out import eval_key, finished, read_eval_set
from pipeline.evaluation.pairs import pair_key
from pipeline.evaluation.scorers import find_scorer, try_scorer
from pipeline.monitoring.phases import phase
from pipeline.monitoring.trackers import tracker_problems
from pipeline.planning.architecture_rules import architecture_problems
from pipeline.planning.length_rules import engine_positions, held_out_problems, sample_problems
from pipeline.planning.nodes import Graph, Node, PairEvaluation, make_node, result_of
from pipeline.planning.planned import memory_problems
from pipeline.planning.reward_rules import (
    function_sources,
    reward_base_problems,
    reward_column_problems,
    reward_source_problems,
    start_environments,
)
from pipeline.rewards.user_functions import start_functions
from pipeline.stages.prepared import Reader, StageRecords, prepare, read_records

if TYPE_CHECKING:
    from actors.models.facts import BaseFacts
    from pipeline.config.run_config import RunConfig


@dataclass(frozen=True)
class RunRecords:
    """Every row that a run reads."""

    stages: dict[str, StageRecords]
    held_out: Records | None
    reader: Reader


def read_rows(config: RunConfig, until: str | None = None, problems: Sequence[str] = ()) -> RunRecords:
    """Read all data of a run; needs neither a tokenizer nor Ray, so nothing is started for bad data.

    Raises:
        UserError: everything wrong with data, trackers and scorer, from all stages at once, after the
            `problems` that were found before.
    """
    rewarding = function_sources(config, up_to(config, until))
    scoring = [config.eval.metric] if config.eval is not None and ":" in config.eval.metric else []
    start_environments(config, up_to(config, until))
    start_functions([*rewarding, *scoring])  # Their modules are imported while the rows are read.
    in_rows: list[str] = []
    reader = Reader()
    stages: dict[str, StageRecords] = {}
    held_out = None
    for name in up_to(config, until):
        rows = attempt(in_rows, f"stages.{name}", read_records, config.stage(name), reader)
        if rows is not None:
            stages[name] = rows
    problems = [*problems, *tracker_problems(config.logging.report_to)]
    problems += reward_source_problems(config, up_to(config, until))
    problems += in_rows
    for name, read in stages.items():
        problems += reward_column_problems(name, config.stages[name], read.train.columns, len(read.train))
    if (spec := config.eval) is not None:
        scorer = attempt(problems, "eval.metric", find_scorer, spec.metric)
        seed, most = config.seed, spec.max_rows
        held_out = attempt(problems, "eval.data", load_records, spec.data, "prompt", seed=seed, max_rows=most)
        if scorer is not None and held_out is not None:
            talks = config.eval_turns() is not None
            attempt(problems, "", try_scorer, spec, held_out, converses=talks)
    if problems:
        raise UserError(problems)
    # Those that trying the metric has ended begin anew, while the run goes on.
    start_functions(rewarding)
    return RunRecords(stages, held_out, reader)


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
    on_this_machine: bool = True,
) -> Graph:
    """Tokenise every stage's rows and decide what each stage needs. `facts` waits for those of the base;
    `on_this_machine`: the run has no other cluster.

    Raises:
        UserError: everything wrong with the base, the template and the lengths of rows.
    """
    from actors.models.base.loading import load_tokenizer, locate_base

    phase("reading the base's tokenizer")
    began = time.monotonic()
    problems: list[str] = []
    graph = date = None
    try:
        local, adapter = locate_base(config.model)
        weights = {"base": Weights.on_disk(local, adapter, local, *([adapter] if adapter else []))}
        tokenizer = load_tokenizer(config.model)
        date = keep_date(tokenizer, directory.path)
        startup["tokenizer"] = round(time.monotonic() - began, 2)
        graph = tokenised(config, directory, weights, tokenizer, records)
        startup["tokens"] = round(time.monotonic() - began - startup["tokenizer"], 2)
    except UserError as error:
        problems = error.problems
    phase("reading the base's config")
    began = time.monotonic()
    base = facts()
    startup["wait for what the base is"] = round(time.monotonic() - began, 2)
    problems = [*base.problems, *(problem for problem in problems if problem not in base.problems)]
    if graph is not None:
        problems += [] if base.problems else reward_base_problems(config, records.stages)
        if base.model_type is not None:
            problems += architecture_problems(
                config, base.model_type, records.stages, base.n_experts, base.split_sizes, base.n_heads
            )
        positions = engine_positions(config, base.max_positions)
        problems += [problem for node in graph.nodes for problem in sample_problems(node.prepared, positions)]
        problems += held_out_problems(graph.held_out, positions) if graph.held_out is not None else []
        problems += memory_problems(
            config, base.sizes, [node.name for node in graph.pending], on_this_machine
        )
    if problems or graph is None:
        raise UserError(problems)
    graph.template_date = date
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
        ends, known = turn_ends(tokenizer, config.model.base), vocab_size(config.model.base)
        graph.held_out = read_eval_set(
            config.eval, tokenizer, config.seed, records.held_out, ends, known, config.eval_turns()
        )
        for name in config.eval_models():
            if name in weights:
                key = eval_key(weights[name], graph.held_out, config.eval, config.seed)
                graph.evaluations[name] = key
                done = finished(directory.path / "eval", name, key, graph.held_out.code)
                graph.evaluations_pending |= done is None
    return graph


def pair_evaluations(graph: Graph, directory: Path) -> list[PairEvaluation]:
    """Reward stages with held-out pairs, and whether these were scored already."""
    found = []
    for node in graph.nodes:
        if node.spec.makes == "reward_model" and node.prepared.eval_data is not None:
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
        stage = config.stage(name)
        prepared = attempt(problems, f"stages.{name}", prepare, stage, tokenizer, rows, records.reader)
        if prepared is None or problems:
            continue
        node = make_node(config, directory, weights, prepared)
        nodes.append(node)
        weights[name] = result_of(config, node)
    if problems:
        raise UserError(problems)
    return nodes

"""`raylign validate`: everything that is wrong with a run, found without starting anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.cluster import is_local, passed_on
from actors.errors import attempt
from pipeline.monitoring.phases import phase

if TYPE_CHECKING:
    from actors.models.base.loading import ResolvedBase
    from actors.models.facts import BaseSizes
    from actors.models.lora.targets import Targets
    from pipeline.config.run_config import RunConfig
    from pipeline.data.reading.records import Records
    from pipeline.data.reading.shared_prompts import Place

T = TypeVar("T")


@dataclass
class Findings:
    """Findings, good and bad."""

    problems: list[str] = field(default_factory=list)
    base: ResolvedBase | None = None
    architecture: list[str] = field(default_factory=list)
    """Its row in the table: groups, limits, what vLLM is given for it."""
    template: list[str] = field(default_factory=list)
    """Tokens that end a turn, and where they come from; the date, if the chat template writes it."""
    targets: Targets | None = None
    stages: list[list[str]] = field(default_factory=list)
    """Stage, start, reference, rows, tokens (median, longest sequence), steps x rows (or samples)."""
    remarks: list[str] = field(default_factory=list)
    """Rows that were left out, and what else is worth saying of the data."""
    sizes: BaseSizes | None = None
    """Of the base's weights."""
    longest: dict[str, int] = field(default_factory=dict)
    """Stage -> tokens of its longest sequence."""
    sync_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes that each sync of an online stage sends to one engine."""
    memory: str = ""
    """The plan of memory in a line; empty: the base is unknown."""
    sources: list[str] = field(default_factory=list)
    """A line for each source: key, split with its files, rows."""
    prompts: int | None = None
    """Held-out prompts, when the run evaluates."""

    def attempt(self, action: Callable[[], T], where: str = "") -> T | None:
        """Result of `action`, or None and its problems noted."""
        return attempt(self.problems, where, action)

    def note_sources(self, key: str, records: Records) -> None:
        """Note the files of each source of `records`."""
        from pipeline.data.reading.raw_rows import describe_files

        for use in records.sources:
            read = describe_files(use.spec.source, use.spec.split, use.files)
            self.sources.append(f"{key}: {use.spec.source}, {use.rows_used:,} rows of {read}")

    def note_shared(self, key: str, held_out: Records, trained: dict[str, dict[int, Place]]) -> None:
        """Prompts of held-out rows that stages are trained on."""
        from pipeline.data.reading.shared_prompts import shared_prompts

        for name, prompts in trained.items():
            if shared := shared_prompts(prompts, held_out):
                self.remarks.append(f"warning: {key} has prompts that stages.{name}.data has too: {shared}")

    def positions(self, config: RunConfig) -> int:
        """Tokens of prompt and completion that an engine holds; the base has been read."""
        from actors.models.facts import max_positions
        from pipeline.planning.length_rules import engine_positions

        assert self.base is not None
        assert self.base.config is not None
        return engine_positions(config, max_positions(self.base.config))


def find(config: RunConfig) -> Findings:
    """Look at run directory, trackers, base, LoRA targets, every stage's data, and at this machine where the
    run would be a local one."""
    from pipeline.rewards.user_functions import functions_closed

    with functions_closed():
        return _find(config)


def _find(config: RunConfig) -> Findings:
    from pipeline.artifacts.hiding import hiding_problems
    from pipeline.artifacts.run_directory import RunDirectory
    from pipeline.monitoring.trackers import tracker_problems
    from pipeline.planning.costs.payloads import payload_bytes
    from pipeline.planning.planned import memory_line, memory_problems
    from pipeline.planning.resources import machine_problems
    from pipeline.planning.reward_rules import reward_source_problems, start_environments
    from pipeline.rewards.user_functions import start_functions

    findings = Findings()
    start_environments(config, config.stages)
    served = {key: source for key, source in config.functions().items() if key not in config.environments()}
    start_functions(served.values())  # Their modules are imported while the base is looked at.
    findings.attempt(RunDirectory(config.output_dir, config.name).refuse_foreign)
    findings.problems += machine_problems(config)
    findings.problems += hiding_problems(config.functions(), Path.cwd())
    findings.attempt(lambda: passed_on(config.ray.env))
    findings.problems += tracker_problems(config.logging.report_to)
    phase("reading the base's config and tokenizer")
    tokenizer = _look_at_model(config, findings)
    findings.problems += reward_source_problems(config, config.stages)
    if findings.sizes is not None:
        findings.sync_bytes = {
            name: payload_bytes(stage.sync.payload, findings.sizes, config.model)
            for name, stage in config.online_stages().items()
        }
    findings.problems += memory_problems(config, findings.sizes, config.stages, is_local(config.ray.address))
    trained: dict[str, dict[int, Place]] = {}
    for name in config.stages:
        _look_at_stage(config, name, tokenizer, findings, trained)
    _look_at_eval(config, tokenizer, findings, trained)
    if findings.sizes is not None:
        findings.memory = memory_line(config, findings.sizes, findings.longest)
    return findings


def _look_at_model(config: RunConfig, findings: Findings) -> Any:
    """Base and targets into the findings; the tokenizer, or None."""
    from actors.models.base.loading import load_tokenizer, resolve_base
    from actors.models.facts import bare_model, base_sizes, describe_small, n_experts, n_heads, split_sizes
    from actors.models.lora.adapters import quantization_problems
    from actors.models.lora.targets import resolve_targets
    from actors.models.turn_ends import turn_ends
    from pipeline.data.tokens.template_date import date_notice, keep_date
    from pipeline.planning.architecture_rules import architecture_problems, describe_architecture
    from pipeline.planning.reward_rules import reward_base_problems

    findings.base = base = resolve_base(config.model)
    findings.problems += base.problems
    if base.adapter_path is not None and not base.problems:
        wrong = quantization_problems(base.adapter_path, config.model.quantization)
        findings.problems += [f"model.base: {problem}" for problem in wrong]
    lora = config.model.lora
    net = None if base.config is None or base.problems else findings.attempt(lambda: bare_model(base.config))
    if net is not None:
        findings.sizes = findings.attempt(lambda: base_sizes(base.config, net, config.model.quantization))
    if net is not None and lora is not None:
        findings.targets = findings.attempt(
            lambda: resolve_targets(net, lora.targets, lora), "model.lora.targets"
        )
    if base.config is not None and not base.problems:
        findings.problems += reward_base_problems(config, config.stages, base)
        experts = findings.attempt(lambda: n_experts(base.config))
        findings.problems += architecture_problems(
            config,
            base.config.model_type,
            config.stages,
            experts,
            split_sizes(base.config),
            n_heads(base.config),
        )
        findings.architecture = describe_architecture(base.config.model_type)
        findings.architecture += findings.attempt(lambda: describe_small(base.config, config.model)) or []
    tokenizer = None if base.problems else findings.attempt(lambda: load_tokenizer(config.model))
    if tokenizer is not None:
        date = keep_date(tokenizer, Path(config.output_dir), write=False)
        ends = findings.attempt(lambda: turn_ends(tokenizer, config.model.base))
        if ends is None:  # Its template can't be rendered at all, so no row can.
            return None
        findings.template = [ends.describe(tokenizer), *([date_notice(date)] if date else [])]
    return tokenizer


def _look_at_stage(
    config: RunConfig, name: str, tokenizer: Any, findings: Findings, trained: dict[str, dict[int, Place]]
) -> None:
    """A stage's data, into the findings; its prompts into `trained`."""
    from pipeline.data.reading.shared_prompts import trained_prompts
    from pipeline.evaluation.scorers import tried_samples
    from pipeline.planning.length_rules import sample_problems
    from pipeline.planning.nodes import remarks_on_data, use_of_rows
    from pipeline.planning.reward_rules import reward_column_problems, service_problems
    from pipeline.stages.prepared import prepare, read_records

    stage, where = config.stage(name), f"stages.{name}"
    records = findings.attempt(lambda: read_records(stage), where)
    if records is None:
        return
    trained[name] = trained_prompts(records.train)
    findings.note_sources(f"{where}.data", records.train)
    if records.held_out is not None:
        findings.note_sources(f"{where}.eval_data", records.held_out)
        findings.note_shared(f"{where}.eval_data", records.held_out, {name: trained[name]})
    lacking = reward_column_problems(name, stage.spec, records.train.columns, len(records.train))
    findings.problems += lacking or service_problems(name, stage.spec, lambda: tried_samples(records.train))
    if tokenizer is None:
        return
    prepared = findings.attempt(lambda: prepare(stage, tokenizer, records), where)
    if prepared is None:
        return
    findings.problems += sample_problems(prepared, findings.positions(config))
    remarks, use = remarks_on_data(prepared), use_of_rows(prepared)
    findings.remarks += remarks if use in remarks else [use, *remarks]
    stats = prepared.data.stats
    findings.longest[name] = prepared.longest if prepared.online else stats.longest
    findings.stages.append(
        [
            name,
            config.init_of(name),
            config.reference_of(name) or "",
            f"{prepared.data.n_rows:,}",
            f"{stats.median} / {stats.longest}",
            f"{prepared.total_steps:,} x {stage.spec.rows_per_step}",
        ]
    )


def _look_at_eval(
    config: RunConfig, tokenizer: Any, findings: Findings, trained: dict[str, dict[int, Place]]
) -> None:
    from actors.models.turn_ends import turn_ends, vocab_size
    from pipeline.data.reading.records import load_records
    from pipeline.evaluation.held_out import read_eval_set
    from pipeline.evaluation.scorers import find_scorer, try_scorer
    from pipeline.planning.length_rules import held_out_problems

    spec = config.eval
    if spec is None:
        return
    scorer = findings.attempt(lambda: find_scorer(spec.metric), "eval.metric")
    records = findings.attempt(
        lambda: load_records(spec.data, "prompt", seed=config.seed, max_rows=spec.max_rows), "eval.data"
    )
    if records is None:
        return
    findings.note_sources("eval.data", records)
    findings.note_shared("eval.data", records, trained)
    if scorer is None or tokenizer is None:
        return
    ends, known = turn_ends(tokenizer, config.model.base), vocab_size(config.model.base)
    turns = config.eval_turns()
    held_out = findings.attempt(
        lambda: read_eval_set(spec, tokenizer, config.seed, records, ends, known, turns), "eval"
    )
    if held_out is not None:
        findings.attempt(lambda: try_scorer(spec, records, converses=turns is not None))
        findings.problems += held_out_problems(held_out, findings.positions(config))
        findings.prompts = held_out.data.n_rows
        findings.remarks += held_out.remarks()

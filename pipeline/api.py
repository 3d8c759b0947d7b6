"""Raylign from Python: `from pipeline import plan, run, validate`, for notebooks and other programs.

The same specs, checks and runs as those of the command line. What a user got wrong is a `UserError` with
every problem found, what fails at run time a `RunFailure` (both in `actors.errors`); nothing ends the
process. Nothing here loads torch, Ray or vLLM before it is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors.errors import EXIT_STOPPED, UserError

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.resources import Plan
    from pipeline.planning.validate import Findings

    Config = str | Path | Mapping[str, Any] | RunConfig
    """A YAML file, the same as a mapping, or what `load` made of either."""

TELEMETRY = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1"}
"""Environment variables that keep libraries from reporting their use, unless the user has set them."""


@dataclass(frozen=True)
class StageResult:
    """Outcome of one stage."""

    state: Literal["done", "failed", "skipped", "stopped", "running"] | None
    """`skipped`: it was finished before. None: its turn did not come."""
    weights: Path | None
    """Directory of the adapter in PEFT's layout, or of the model; None until it is finished."""
    metrics: dict[str, float]
    """Of its last step."""
    seconds: float | None
    """Of its training, over all sessions that led to its result. Waiting for processes is not in it."""


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run."""

    directory: Path
    stopped: bool
    """It was asked to stop and has saved; the same call goes on from there."""
    stages: dict[str, StageResult]
    """By name, in the order of the config."""
    evaluations: dict[str, dict[str, Any]]
    """Model (`base` or a stage) -> `accuracy` (the mean of the metric), `ci95`, `n` and more."""
    report: Path
    """report.html, for people."""


def load(config: Config, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `config` and `key=value` overrides describe, with every default filled in.

    Raises:
        UserError: every violation: syntax, unknown keys, types, bounds, rules between keys.
    """
    from pipeline.config.load import load_config, load_mapping, resolved

    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if isinstance(config, Mapping):
        return load_mapping(dict(config), overrides)
    return load_mapping(resolved(config), overrides) if overrides else config


def validate(config: Config, overrides: Sequence[str] = ()) -> Findings:
    """Look for everything that is wrong with a run, in its config, data and base; starts nothing.

    Problems are returned, not raised: a run whose `Findings.problems` is empty can start.
    """
    from pipeline.planning.validate import Findings, find

    try:
        loaded = load(config, overrides)
    except UserError as error:
        return Findings(problems=error.problems)
    return find(loaded)


def plan(config: Config, overrides: Sequence[str] = ()) -> Plan:
    """Processes and resources that a run asks of the cluster, by role. Reads the config alone.

    Raises:
        UserError: the config is wrong.
    """
    from pipeline.planning.resources import Plan

    return Plan.of(load(config, overrides))


def run(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    until: str | None = None,
    fresh: bool = False,
) -> RunResult:
    """Run the stages, and go on where an earlier call with the same config ended.

    Args:
        dry_run: all stages on a tiny twin of the base, a few rows, on this machine's CPU.
        until: name of the stage to stop after.
        fresh: forget what the run directory holds and start anew.

    Raises:
        UserError: config, data, base or cluster can't be used; nothing was started.
        RunFailure: an actor failed or overran its deadline, or an invariant did not hold.
    """
    from pipeline.execution.run import run as run_config
    from pipeline.planning.dry_run import shrink

    quiet_telemetry()
    loaded = load(config, overrides)
    check_stage(loaded, until)
    code = run_config(loaded, dry_run=dry_run, until=until, fresh=fresh)
    return result_of(shrink(loaded)[0] if dry_run else loaded, stopped=code == EXIT_STOPPED)


def result_of(config: RunConfig, *, stopped: bool = False) -> RunResult:
    """Outcome that a run directory holds of the run `config`, read from run.json."""
    from pipeline.artifacts.run_directory import RunDirectory

    directory = RunDirectory(config.output_dir, config.name)
    state = directory.read()
    stages = {}
    for name in config.stages:
        found = state["stages"].get(name, {})
        done = found.get("state") in ("done", "skipped")
        weights = [directory.stage(name) / kind for kind in ("adapter", "model")]
        stages[name] = StageResult(
            found.get("state"),
            next((place for place in weights if done and place.is_dir()), None),
            found.get("metrics", {}),
            found.get("seconds"),
        )
    return RunResult(directory.path, stopped, stages, state["eval"], directory.path / "report.html")


def check_stage(config: RunConfig, until: str | None) -> None:
    """Refuse an `until` that names no stage; None: the run ends with its last one.

    Raises:
        UserError: no stage has that name.
    """
    if until is not None and until not in config.stages:
        from pipeline.config.messages import did_you_mean

        names = ", ".join(config.stages)
        raise UserError(
            f"--until: no stage is named '{until}'; stages: {names}{did_you_mean(until, config.stages)}"
        )


def quiet_telemetry() -> None:
    """Keep Ray, the hub and vLLM from reporting their use."""
    for name, value in TELEMETRY.items():
        os.environ.setdefault(name, value)

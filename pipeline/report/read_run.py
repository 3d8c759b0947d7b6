"""Reads a run directory for the report, from files alone.

A report is wanted most when something went wrong. So nothing here raises for a file that is missing, cut off
or of an unknown shape: it takes what can be read, and notes the rest in `RunView.notes`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from actors.errors import UserError
from pipeline.monitoring.formatting import local_time
from pipeline.monitoring.replacements import FILE as REPLACEMENTS
from pipeline.report.routing import to_routing
from pipeline.report.run_view import BASE, REWARD, EvalRow, RunView, StageView
from pipeline.report.series import beyond, fair_share, to_series
from pipeline.report.timeline import Call, last_execution, to_calls
from pipeline.report.tolerant_reading import (
    as_count,
    as_mapping,
    as_number,
    as_numbers,
    read_file,
    read_json,
    read_jsonl,
)

FIRST_STEP = "first training step"
"""The entry of `startup` that is a point in time, not a cause."""

RENEW = "Remove it and run the config again: finished stages are recognised by their manifests, not redone"

WEIGHT_SUFFIXES = (".safetensors", ".bin")


def read_run(run_dir: Path | str, *, works: bool = False) -> RunView:
    """Read a run directory. UserError only when there is no readable run.json in it.

    `works`: the run works at this moment, also where none of its stages does (starting, evaluating).
    """
    directory = Path(run_dir)
    run = _run_json(directory)
    startup = as_numbers(as_mapping(run.get("startup")))
    notes: list[str] = []
    config_text, config = _read_config(directory / "config.yaml", notes)
    stages = _read_stages(directory, run, config, notes)
    evals = _eval_rows(as_mapping(run.get("eval")), notes)
    names = [row.model for row in evals]
    return RunView(
        name=str(run.get("name") or config.get("name") or directory.resolve().name),
        directory=directory,
        state="running" if works else _run_state(run, stages),
        stages=stages,
        evals=evals,
        completions=_read_completions(directory / "eval", names, notes),
        calls=_read_calls(directory / "logs" / "trace", run, notes),
        base=str(as_mapping(config.get("model")).get("base") or BASE),
        config_text=config_text,
        config=config,
        versions=_versions(directory, run, stages),
        first_step=startup.pop(FIRST_STEP, None),
        startup=startup,
        seconds=as_number(run.get("seconds")),
        error=_error_text(run.get("error")),
        began=_date(run.get("began")),
        notes=notes,
        replacements=read_jsonl(directory / REPLACEMENTS, notes),
        as_of=time.time() if works else _written_last(directory, stages),
    )


def _written_last(directory: Path, stages: list[StageView]) -> float:
    """When a run last wrote what it had got to; a run that was killed says `running` for ever."""
    files = [directory / "run.json", *(directory / stage.name / "metrics.jsonl" for stage in stages)]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _run_json(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    try:
        run = json.loads(read_file(path))
    except FileNotFoundError:
        said = f"{directory}: no run.json in it, so this is not a run directory (runs/NAME)"
        if any(directory.glob("*/manifest.json")):
            said += "; if it was removed, run the config again, which writes it anew"
        raise UserError(said) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read: {error}. {RENEW}") from None
    if not isinstance(run, dict):
        raise UserError(f"{path}: holds a {type(run).__name__}, not a mapping. {RENEW}")
    return run


def _read_config(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    try:
        text = read_file(path)
        return text, as_mapping(yaml.safe_load(text))
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} can't be read: {error}")
        return "", {}


def _read_stages(
    directory: Path, run: dict[str, Any], config: dict[str, Any], notes: list[str]
) -> list[StageView]:
    wanted = as_mapping(config.get("stages"))
    found = as_mapping(run.get("stages"))
    stages: list[StageView] = []
    policy = BASE
    # run.json keeps entries of stages that are no longer in the config.
    for name in wanted or found:
        asked, had = as_mapping(wanted.get(name)), as_mapping(found.get(name))
        stage = StageView(
            name=str(name),
            type=str(asked.get("type") or had.get("type") or name),
            state=str(had.get("state") or "pending"),
            init=str(asked.get("init") or had.get("init") or policy),
            seconds=as_number(had.get("seconds")),
            wait=as_number(had.get("wait")),
            metrics=as_mapping(had.get("metrics")),
            error=_error_text(had.get("error")),
            total_steps=as_count(had.get("total_steps")),
        )
        stage.reads = _reads(asked, stage.init, [earlier.name for earlier in stages])
        _read_stage_files(directory / stage.name, stage, notes)
        stages.append(stage)
        if stage.type != REWARD:
            policy = stage.name
    return stages


def _reads(asked: dict[str, Any], init: str, earlier: list[str]) -> dict[str, str]:
    """Other stages that a stage's config names -> what it uses each as."""
    rewards = asked.get("rewards")
    sources = [
        as_mapping(one).get("source", one) for one in (rewards if isinstance(rewards, list) else [rewards])
    ]
    named = [(source, "reward model") for source in sources]
    named += [
        (asked.get(f"{use}{end}"), use)
        for use, end in (("critic", "_init"), ("reference", ""), ("teacher", ""))
    ]
    reads: dict[str, str] = {}
    for name, use in named:
        if isinstance(name, str) and name != init and name in (BASE, *earlier):
            reads.setdefault(name, use)
    return reads


def _read_stage_files(directory: Path, stage: StageView, notes: list[str]) -> None:
    rows = read_jsonl(directory / "metrics.jsonl", notes)
    stage.series = to_series(rows)
    if count := beyond(rows):
        notes.append(f"{stage.name}/metrics.jsonl: {count} number(s) too large for a chart left out")
    stage.samples = read_jsonl(directory / "samples.jsonl", notes)
    stage.router_load = fair_share(read_json(directory / "router_load.json", notes).get("load"))
    stage.routing = to_routing(
        read_jsonl(directory / "routing.jsonl", notes),
        read_json(directory / "engine_load.json", notes).get("load"),
    )
    manifest = read_json(directory / "manifest.json", notes)
    stage.artifact = str(manifest.get("type") or "")
    for kind in ("adapter", "model"):
        folder = directory / kind
        if folder.is_dir():
            stage.artifact = stage.artifact or kind
            weights = [
                file for file in folder.rglob("*") if file.suffix in WEIGHT_SUFFIXES and file.is_file()
            ]
            stage.artifact_bytes = sum(file.stat().st_size for file in weights)


def _eval_rows(evals: dict[str, Any], notes: list[str]) -> list[EvalRow]:
    rows = []
    for model, raw in evals.items():
        figures = as_mapping(raw)
        numbers = as_numbers(figures)
        n = numbers.pop("n", None)
        seconds = numbers.pop("seconds", None)
        key = "accuracy" if "accuracy" in numbers else next(iter(numbers), "")
        if not key:
            notes.append(f"eval.{model}: has no figure")
            continue
        interval = figures.get("ci95")
        bounds = [as_number(bound) for bound in interval] if isinstance(interval, list) else []
        low, high = (bounds[0], bounds[1]) if len(bounds) == 2 else (None, None)
        rows.append(
            EvalRow(
                model=str(model),
                metric=str(figures.get("metric") or key).rsplit(":", 1)[-1],
                value=numbers[key],
                n=None if n is None else int(n),
                ci95=None if low is None or high is None else (low, high),
                seconds=seconds,
            )
        )
    return rows


def _read_completions(
    directory: Path, evaluated: list[str], notes: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """eval/*.jsonl by model: those in the table first and in its order."""
    files = {path.stem: path for path in sorted(directory.glob("*.jsonl"))} if directory.is_dir() else {}
    names = [name for name in evaluated if name in files] + [name for name in files if name not in evaluated]
    completions = {name: read_jsonl(files[name], notes) for name in names}
    # Rows of a reward model are scores of pairs, not generations.
    kept = {name: [row for row in rows if "completion" in row] for name, rows in completions.items()}
    return {name: rows for name, rows in kept.items() if rows}


def _read_calls(directory: Path, run: dict[str, Any], notes: list[str]) -> list[Call]:
    """The traces of all processes, of the run's last execution."""
    files = sorted(directory.glob("*.jsonl")) if directory.is_dir() else []
    calls = [call for file in files for call in to_calls(file.stem, read_jsonl(file, notes))]
    running = run.get("state") == "running" or any(
        as_mapping(stage).get("state") == "running" for stage in as_mapping(run.get("stages")).values()
    )
    return last_execution(
        calls, as_number(run.get("began")), None if running else as_number(run.get("seconds"))
    )


def _versions(directory: Path, run: dict[str, Any], stages: list[StageView]) -> dict[str, str]:
    candidates = [run.get("versions")]
    candidates += [
        read_json(directory / stage.name / "manifest.json", []).get("versions") for stage in stages
    ]
    for versions in candidates:
        if isinstance(versions, dict) and versions:
            return {str(name): str(version) for name, version in versions.items()}
    return {}


def _run_state(run: dict[str, Any], stages: list[StageView]) -> str:
    if run.get("state"):
        return str(run["state"])
    states = {stage.state for stage in stages}
    for state in ("failed", "running", "stopped"):
        if state in states:
            return state
    return "done" if states <= {"done", "skipped"} else "stopped"


def _error_text(error: Any) -> str:
    """An error as one text: a string, or RunFailure's fields who, phase, reason, next_step."""
    if isinstance(error, dict):
        who, phase, reason = (str(error.get(key) or "") for key in ("who", "phase", "reason"))
        place = " in ".join(part for part in (who, phase and f"phase '{phase}'") if part)
        text = ": ".join(part for part in (place, reason) if part)
        step = error.get("next_step")
        return f"{text}\nnext: {step}" if step else text
    return "" if error is None else str(error)


def _date(value: Any) -> str:
    """Seconds since the epoch as local date and time; a text is returned unchanged."""
    seconds = as_number(value)
    return str(value or "") if seconds is None else local_time(seconds, "%Y-%m-%d %H:%M")

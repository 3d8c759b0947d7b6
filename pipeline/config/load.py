"""A YAML file and overrides as a `RunConfig`, or every violation at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from actors.errors import UserError
from pipeline.config.messages import bad_paths, explain, joined, keys_in
from pipeline.config.problem import Problem
from pipeline.config.rules.cross import cross_problems
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_reader import apply_overrides, read_mapping, set_key, too_large

_NAMING_STAGES = frozenset({"init", "reference", "models", "rewards", "critic_init"})
"""Keys whose values are names of stages."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a file and `key=value` overrides describe.

    Raises:
        UserError: with every violation: syntax, unknown keys, types, bounds, rules between fields.
    """
    return load_mapping(read_mapping(Path(path)), overrides)


def load_mapping(data: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """As `load_config`, of what a file would hold.

    Raises:
        UserError: with every violation.
    """
    data, problems = apply_overrides(data, overrides)
    try:
        config, violations = validate(data)
    except RecursionError:
        raise UserError(
            "the config has too many levels in each other, or a value that holds itself"
        ) from None
    problems += violations
    if problems or config is None:
        raise UserError([str(problem) for problem in problems])
    return config


def validate(data: dict[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """The config, or None and all that is wrong with `data`."""
    try:
        config = RunConfig.model_validate(data, strict=True)
    except ValidationError as error:
        problems = _with_size(explain(error, data, RunConfig), data)
        bad = bad_paths(error, data, RunConfig)
        if bad:
            problems += _rules_of_the_rest(data, bad)
        return None, problems
    problems = _with_size(joined(cross_problems(config)), data)
    return (None if problems else config), problems


def _with_size(problems: list[Problem], data: dict[str, Any]) -> list[Problem]:
    """Problems, with those of whole numbers that are too large in place of what else is said of these."""
    large = too_large(data)
    named = {problem.path for problem in large}
    return [*large, *(problem for problem in problems if problem.path not in named)]


def _rules_of_the_rest(data: dict[str, Any], bad: dict[tuple[str, ...], set[str]]) -> list[Problem]:
    """Broken rules between fields that have nothing to do with the refused keys.

    The rules need a whole config, so the refused keys fall back to their defaults; a rule of their own
    section that names a field in doubt, or of stages when one is unusable, is left for the next round.
    """
    rest: Any = data
    for path in sorted(bad):
        rest = _without(rest, path)
    rest = _filled(rest)
    try:
        config = RunConfig.model_validate(rest, strict=True)
    except ValidationError:
        return []
    doubts: dict[str, set[str]] = {}
    for path, names in bad.items():
        doubts.setdefault(".".join(path[:-1]), set()).update(names)
    a_stage_is_gone = any(path[0] == "stages" and len(path) <= 2 for path in bad)
    return [
        problem
        for problem in joined(cross_problems(config))
        if not any(
            name in f"{problem.path.rpartition('.')[2]}: {problem.message}"
            for name in doubts.get(problem.path.rpartition(".")[0], ())
        )
        and not any(_within(problem.path, path) for path in bad)
        and not (a_stage_is_gone and _NAMING_STAGES & set(problem.path.split(".")))
    ]


def _within(path: str, refused: tuple[str, ...]) -> bool:
    return tuple(path.split("."))[: len(refused)] == refused


def _filled(rest: Any) -> Any:
    """`rest` with a stand-in for every required key that it lacks."""
    try:
        RunConfig.model_validate(rest, strict=True)
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] == "missing":
                *parents, key = keys_in(rest, detail["loc"])
                stand_in = {"base": "unnamed"} if key == "model" else "unnamed"
                rest = set_key(rest, [*parents, key], stand_in)
    return rest


def _without(node: Any, path: tuple[str, ...]) -> Any:
    key, rest = path[0], path[1:]
    if isinstance(node, list):
        index = int(key) if key.isdigit() else -1
        if not 0 <= index < len(node):
            return node
        return [*node[:index], *([_without(node[index], rest)] if rest else []), *node[index + 1 :]]
    if not isinstance(node, dict) or key not in node:
        return node
    if not rest:
        return {name: value for name, value in node.items() if name != key}
    return {**node, key: _without(node[key], rest)}


def resolved(config: RunConfig) -> dict[str, Any]:
    """Every setting with its value, as plain data that loads back into the same config."""
    data = config.model_dump(mode="json")
    for name, role in data["roles"].items():
        if role["share"] is not None:
            data["roles"][name] = {"share": role["share"]}
    return data


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, for the run directory."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True, width=100)

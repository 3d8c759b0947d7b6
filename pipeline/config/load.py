"""A YAML file and overrides as a `RunConfig`, or every violation at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from actors.errors import UserError
from pipeline.config.messages import bad_paths, explain, joined
from pipeline.config.names import NAME_PATTERN, NAME_RULE
from pipeline.config.problem import Problem
from pipeline.config.rest import rules_of_the_rest
from pipeline.config.rules.cross import cross_problems
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_reader import apply_overrides, read_mapping, too_large


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a file and `key=value` overrides describe; its name is the file's where none is given.

    Raises:
        UserError: with every violation: syntax, unknown keys, types, bounds, rules between fields.
    """
    return _loaded(read_mapping(Path(path)), overrides, Path(path).stem)


def load_mapping(data: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """As `load_config`, of what a file would hold.

    Raises:
        UserError: with every violation.
    """
    return _loaded(data, overrides, None)


def _loaded(data: dict[str, Any], overrides: Sequence[str], file: str | None) -> RunConfig:
    data, problems = apply_overrides(data, overrides)
    if file is not None and "name" not in data:
        fits = re.fullmatch(NAME_PATTERN, file) is not None
        if not fits:
            said = f"missing, and the file's own, '{file}', can't be one: {NAME_RULE}"
            problems.append(Problem("name", said))
        data = {"name": file if fits else "unnamed", **data}
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
            problems += rules_of_the_rest(data, bad)
        return None, problems
    problems = _with_size(joined(cross_problems(config)), data)
    return (None if problems else config), problems


def _with_size(problems: list[Problem], data: dict[str, Any]) -> list[Problem]:
    """Problems, with those of whole numbers that are too large in place of what else is said of these."""
    large = too_large(data)
    named = {problem.path for problem in large}
    return [*large, *(problem for problem in problems if problem.path not in named)]


def resolved(config: RunConfig) -> dict[str, Any]:
    """Every setting with its value, as plain data that loads back into the same config."""
    data = config.model_dump(mode="json")
    for name, role in data["roles"].items():
        if role["share"] is not None:
            data["roles"][name] = {key: role[key] for key in config.roles.of(name).beside_share}
    return data


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, for the run directory."""
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True, width=100)

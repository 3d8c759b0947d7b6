"""Files and directories of this machine that a run's configuration names: what a job must find as well."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from actors.errors import UserError
from pipeline.artifacts.user_code import code_of

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.data.spec import DataSpec

CONFIG = "CONFIG"
"""Key of the configuration itself."""
ELSEWHERE = "give an absolute path that every node sees"


@dataclass(frozen=True)
class Input:
    """A file or directory that a job reads."""

    key: str
    path: Path


def named_inputs(config: RunConfig, working_dir: Path, problems: list[str]) -> Iterator[Input]:
    """Inputs that must be in the package: base, data, reward models, code of functions and metrics.

    Absolute paths are the user's word that every node sees them. What can't be looked up, and what can't be
    in any package, goes to `problems`.
    """
    yield from _model("model.base", config.model.base, problems)
    for name, stage in config.stages.items():
        for field, sources in (("data", stage.data), ("eval_data", stage.eval_data or [])):
            for spec in sources:
                yield from _data(f"stages.{name}.{field}", spec, problems)
        for position, reward in enumerate(stage.rewards if stage.online else []):
            key = f"stages.{name}.rewards.{position}"
            if reward.reward_model is not None and reward.reward_model not in config.stages:
                yield from _model(key, reward.reward_model, problems, always=True)
            if reward.judge_model is not None:
                yield from _model(key, reward.judge_model, problems)
            if reward.file is not None and not _of_a_home(key, reward.file, problems):
                yield from _file(key, Path(reward.file))
    if config.eval is not None:
        for spec in config.eval.data:
            yield from _data("eval.data", spec, problems)
    for key, source in config.functions().items():
        yield from _code(key, source, working_dir, problems)


def _model(key: str, named: str, problems: list[str], always: bool = False) -> Iterator[Input]:
    """The directory of a base or an adapter, and of the base under an adapter.

    Args:
        always: the name can be no hub id.
    """
    path = Path(named)
    if _of_a_home(key, named, problems):
        return
    if path.is_absolute():
        return
    if not path.exists():
        if always:
            problems.append(f"{key}: {named}: no such directory (looked in {Path.cwd()})")
        return
    yield Input(key, path)
    try:
        base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no adapter, or a damaged one, which its reader tells of
    if isinstance(base, str) and Path(base).exists():
        below = Path(base)
        if not below.is_absolute():
            yield Input(f"{key} (base of the adapter)", below)


def _file(key: str, path: Path) -> Iterator[Input]:
    if not path.is_absolute():
        yield Input(key, path)


def _data(key: str, spec: DataSpec, problems: list[str]) -> Iterator[Input]:
    from pipeline.data.reading.sources import local_files

    source = spec.source
    if source.startswith("builtin:") or _of_a_home(key, source, problems) or Path(source).is_absolute():
        return
    try:
        files = local_files(spec) or []
    except UserError as error:
        problems.extend(problem if key in problem else f"{key}: {problem}" for problem in error.problems)
        return
    yield from (Input(key, path) for path in files)
    card = Path(source) / "README.md"  # says which files belong to which split
    if files and card.is_file():
        yield Input(key, card)


def _code(key: str, function: str, working_dir: Path, problems: list[str]) -> Iterator[Input]:
    """The modules of a function that lie in the working directory; those of PYTHONPATH can't be shipped."""
    code = code_of(function)
    root = working_dir.resolve()
    variable = [
        Path(place).resolve() for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place
    ]
    for name, path in code.files.items() if code is not None else ():  # `find_function` tells of one without
        beside = PathFinder.find_spec(name.partition(".")[0], [str(root)])
        if beside is not None and path.is_relative_to(root):
            yield Input(f"{key} ({name})", path)
        elif any(path.is_relative_to(place) for place in variable):
            problems.append(
                f"{key}: {function} needs the module {name} at {path}, which is found here by PYTHONPATH and "
                f"is not shipped; move it into {root}, or install it on every node"
            )


def _of_a_home(key: str, named: str, problems: list[str]) -> bool:
    """True, with a problem, for a path that begins with ~: it means another directory on other machines."""
    if not named.startswith("~"):
        return False
    problems.append(f"{key}: {named} is in this user's home here, which may lie elsewhere there; {ELSEWHERE}")
    return True


def unshipped(found: Input, lacks: Callable[[Path], list[Path]], working_dir: Path) -> str | None:
    """The reason why a job would not find an input, and what to do; None: it is in the package."""
    missing = lacks(found.path)
    if not missing:
        return None
    root = working_dir.resolve()
    first = Path(os.path.abspath(missing[0]))
    if not first.is_relative_to(root) and found.key == CONFIG:
        return f"{CONFIG}: {found.path} lies outside {root}, which is what is shipped; move it there"
    if not first.is_relative_to(root):
        return (
            f"{found.key}: {found.path} lies outside {root}, which is what is shipped; move it there, or "
            f"{ELSEWHERE}"
        )
    inside = first.relative_to(root)
    what = f"{found.path} ({inside})" if first != Path(os.path.abspath(found.path)) else str(found.path)
    if inside.parts[0] in ("runs", ".venv", "venv"):
        return f"{found.key}: {what} is not shipped ({inside.parts[0]}/ stays here); {ELSEWHERE}"
    return (
        f"{found.key}: {what} is not shipped, because .gitignore, .rayignore or the list of what stays here "
        f"(docs/cluster.md) excludes it; move it, or {ELSEWHERE}"
    )

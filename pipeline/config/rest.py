"""The rules between keys where other keys were refused, so that a message has both.

The rules need a whole config. What was refused is put away, or replaced by something that breaks no rule;
a rule that has to do with it is left for the next round.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from pipeline.config.messages import bad_paths, joined, keys_in
from pipeline.config.problem import Problem
from pipeline.config.rules.cross import cross_problems
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_reader import set_key
from pipeline.stages.specs.registry import STAGE_TYPES

KeyPath = tuple[str, ...]
Doubts = dict[KeyPath, set[str]]
"""Refused keys, each with the names of fields whose values are in doubt with it."""

UNNAMED = "unnamed"
STAND_INS: dict[str, Any] = {
    "model": {"base": UNNAMED},
    "data": {"source": UNNAMED},
    "eval_data": {"source": UNNAMED},
    "rewards": {"source": f"{UNNAMED}:{UNNAMED}"},
}
"""Key -> a value, or an element of its list, that breaks no rule. Elements keep their numbers."""
ROUNDS = 8
"""Times that something is put away: what is left may be refused for what is missing in it."""


def rules_of_the_rest(data: dict[str, Any], refused: Doubts) -> list[Problem]:
    """Broken rules between keys that have nothing to do with the refused ones."""
    doubts = {path: set(names) for path, names in refused.items() if path}
    config = _without_refused(data, doubts)
    if config is None:
        return []
    gone = [path[1] for path in doubts if path[0] == "stages" and len(path) == 2]
    return [
        problem
        for problem in joined(cross_problems(config))
        if not any(_in_doubt(problem, path, names) for path, names in doubts.items())
        and not any(_names_stage(problem, stage) for stage in gone)
    ]


def _without_refused(data: dict[str, Any], doubts: Doubts) -> RunConfig | None:
    """The config without what was refused; what is refused in the rest comes to `doubts` and goes too."""
    rest: Any = data
    new = doubts
    for _ in range(ROUNDS):
        # From the back: an element that goes would change the numbers of those behind it.
        for path in sorted(new, key=_by_number, reverse=True):
            rest = _without(rest, path)
        rest = _filled(rest)
        try:
            return RunConfig.model_validate(rest, strict=True)
        except ValidationError as error:
            new = {path: names for path, names in bad_paths(error, rest, RunConfig).items() if path}
        for path, names in new.items():
            doubts.setdefault(path, set()).update(names)
    return None


def _by_number(path: KeyPath) -> list[tuple[int, str]]:
    return [(int(key) if key.isdigit() and len(key) < 10 else 0, key) for key in path]


def _in_doubt(problem: Problem, refused: KeyPath, names: set[str]) -> bool:
    """True for a problem of a refused key, or one of its section or above that names a field in doubt."""
    at = tuple(problem.path.split("."))
    if at[: len(refused)] == refused:
        return True
    section = refused[:-1]
    if refused[-1].isdigit() and len(refused) > 1:  # an element of a list: all of the list is in doubt
        section, names = refused[:-2], {refused[-2]}
    if at[:-1] != section and at != section[: len(at)]:
        return False
    said = f"{at[-1]}: {problem.message}"
    return any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", said) for name in names)


def _names_stage(problem: Problem, stage: str) -> bool:
    """True for a problem of a key that names this stage, of whose type nothing is known."""
    return problem.path.startswith(("stages.", "eval.")) and f"'{stage}'" in problem.message.split(";")[0]


def _filled(rest: Any) -> Any:
    """`rest` with a stand-in for every required key that it lacks."""
    try:
        RunConfig.model_validate(rest, strict=True)
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] == "missing":
                *parents, key = keys_in(rest, detail["loc"])
                rest = set_key(rest, [*parents, key], STAND_INS.get(key, UNNAMED))
    return rest


def _without(node: Any, path: KeyPath, above: str = "") -> Any:
    """`node` without what is at `path`; a stage, and an element of a list that has a stand-in, gets that."""
    key, rest = path[0], path[1:]
    if isinstance(node, list):
        index = int(key) if key.isdigit() else -1
        if not 0 <= index < len(node):
            return node
        if rest:
            return [*node[:index], _without(node[index], rest, key), *node[index + 1 :]]
        kept = [STAND_INS[above]] if above in STAND_INS else []
        return [*node[:index], *kept, *node[index + 1 :]]
    if not isinstance(node, dict) or key not in node:
        return node
    if rest:
        return {**node, key: _without(node[key], rest, key)}
    if above == "stages":
        return {**node, key: _stage(key, node[key])}
    return {name: value for name, value in node.items() if name != key}


def _stage(name: str, given: Any) -> dict[str, Any]:
    """A stage in place of one that was refused, of its type if that is one."""
    kind = given.get("type", name) if isinstance(given, dict) else name
    known = isinstance(kind, str) and kind in STAGE_TYPES
    return {"type": kind if known else "sft", "data": STAND_INS["data"]}

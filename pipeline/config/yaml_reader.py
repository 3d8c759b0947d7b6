"""YAML in, plain values out: YAML 1.2's scalars, no silent duplicates, `key=value` overrides."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from actors.errors import UserError
from pipeline.config.problem import Problem

_SOURCES = frozenset({"data", "eval_data", "rewards"})
"""Keys whose plain string, alone or in a list, is short for `{source: string}`."""


LARGEST_INT = 2**63 - 1
"""What torch, numpy and Ray count with."""
MOST_DIGITS = 400
"""Of a whole number that is read at all; `too_large` names the key of those above `LARGEST_INT`."""
MOST_VALUES = 1_000_000
"""Values that aliases may expand a file to: a file of a few lines can stand for billions."""

MOST_LEVELS = 100
"""Of `[` and `{` in each other. PyYAML takes seconds for a thousand before Python's own limit ends it."""

TOO_MANY_LEVELS = "too many levels in each other"
HOLDS_ITSELF = "an alias (`*name`) stands inside the value that it names"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core scalars: `1e-4` is a number; `no`, `on` and dates are strings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """Read a `[` or `{`, up to `MOST_LEVELS` in each other."""
        if self.flow_level >= MOST_LEVELS:
            raise yaml.YAMLError(TOO_MANY_LEVELS)
        super().fetch_flow_collection_start(token)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A node's value. PyYAML's constructors fail in many ways on a text that is not of the tag before it
        (`!!int x`, `!!bool maybe`, `!!timestamp x`)."""
        try:
            return super().construct_object(node, deep)
        except yaml.constructor.ConstructorError as error:
            if "recursive" in str(error.problem):
                error.problem = HOLDS_ITSELF
            raise
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            text = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            shown = f"'{text[:40]}...' ({len(text):,} characters)" if len(text) > 60 else f"'{text}'"
            said = f"{shown} is no {tag}" if text or tag else str(error)
            raise yaml.MarkedYAMLError(problem=said, problem_mark=node.start_mark) from None


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
    ("merge", r"^<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > MOST_DIGITS:
        raise yaml.MarkedYAMLError(
            problem=f"a number of {len(text):,} digits is too large: whole numbers reach to {LARGEST_INT}",
            problem_mark=node.start_mark,
        )
    return int(text)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(value) and "inf" not in text:
        raise yaml.MarkedYAMLError(
            problem=f"{text[:40]} is too large: numbers reach to 1.8e308", problem_mark=node.start_mark
        )
    return value


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"'{key}' is given twice (first on line {seen[key]})",
                problem_mark=key_node.start_mark,
            )
        seen[key] = line
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str) -> Any:
    """One YAML document as plain values.

    Raises:
        yaml.YAMLError: bad syntax, a key given twice, or values that hold themselves or are too many.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        if _count(value, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
    except RecursionError:
        raise yaml.YAMLError(TOO_MANY_LEVELS) from None
    return value


def _count(value: Any, known: dict[int, int]) -> int:
    """Values below one, repeated ones each time; `known`: sizes by id, 0 while they are counted."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) not in known:
        known[id(value)] = 0
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(one, known) for one in inner)
    elif known[id(value)] == 0:
        raise yaml.YAMLError(HOLDS_ITSELF)
    return known[id(value)]


def too_large(node: Any, path: str = "") -> list[Problem]:
    """Whole numbers that nothing here counts to, each with its key."""
    if isinstance(node, int) and abs(node) > LARGEST_INT:
        return [Problem(path, f"{str(node)[:24]}... is too large: whole numbers reach to {LARGEST_INT}")]
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, one in inner for found in too_large(one, f"{path}.{key}".strip("."))]


def ready_configs() -> Path | None:
    """Directory of the configs that come with Raylign: of a checkout, or of an installed package."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "configs", package.parent / "configs")
    return next((place for place in places if (place / "demo.yaml").is_file()), None)


def _instead(path: Path) -> str:
    """Hints on what was meant by a file that is not there."""
    near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    if near:
        return f"; {path.parent}/ has: {', '.join(near[:8])}"
    ready = ready_configs()
    if ready is not None and (ready / path.name).is_file():
        return f"; the config of this name that comes with Raylign is {ready / path.name}"
    return "; `raylign init` writes a starter"


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, unreadable, not UTF-8, not YAML, or not a mapping.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_instead(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        data = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise UserError(f"{path}:{where} {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({error})") from None
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{path}: {found}; expected `key: value` lines (`raylign init` writes a starter)")
    return {str(key): value for key, value in data.items()}


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """`data` with each `dotted.key=value` set (values are YAML), and what was wrong with them."""
    problems: list[Problem] = []
    for text in overrides:
        key, equals, value_text = text.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            problems.append(Problem("", f"'{text}' is not key=value (e.g. stages.sft.learning_rate=1e-4)"))
            continue
        try:
            value = parse_yaml(value_text)
        except yaml.YAMLError as error:
            why = getattr(error, "problem", None) or getattr(error, "context", None) or error
            problems.append(Problem(key, f"'{value_text[:200]}' is not a YAML value: {why}"))
            continue
        try:
            data = set_key(data, key.split("."), value)
        except NoPlaceError as error:
            problems.append(Problem(key, str(error)))
    return data, problems


class NoPlaceError(Exception):
    """An override whose path runs through something that is no mapping."""


def set_key(node: Any, path: list[str], value: Any, above: str = "") -> Any:
    """A copy of `node` in which `path` is `value`."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    where = f"{above}.{key}" if above else key
    if isinstance(node, str) and _SOURCES & set(above.split(".")[-2:]):
        node = {"source": node}
    if node is None:
        node = {}
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise NoPlaceError(f"{above} is a list of {len(node)}; name an element by its number from 0")
        index = int(key)
        return [*node[:index], set_key(node[index], rest, value, where), *node[index + 1 :]]
    if not isinstance(node, dict):
        raise NoPlaceError(f"{above} is {node!r}, which has no keys")
    return {**node, key: set_key(node.get(key), rest, value, where)}

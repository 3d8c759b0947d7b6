"""pydantic's errors as sentences: the key's path, the value, and the nearest valid name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.fields import all_paths, arms, description, fields_at, models_at, stage_types
from pipeline.config.names import NAME_RULE
from pipeline.config.problem import Problem
from pipeline.config.trl_keys import INSTEAD, INSTEAD_OF_VALUE

_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping (`key: value` lines)",
    "model_type": "a mapping (`key: value` lines)",
    "model_attributes_type": "a mapping (`key: value` lines)",
    "path_type": "a path",
    "is_instance_of": "a path",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


SHOWN_KEYS = 24
"""Keys of a section that a message names; a stage has twice as many."""


SHOWN_TEXT = 200
"""Characters of a value that a message repeats."""


def explain(error: ValidationError, data: dict[str, Any], model: type[BaseModel]) -> list[Problem]:
    """One problem per key that is wrong; what pydantic says twice about a union's arms is joined."""
    by_path: dict[str, list[str]] = {}
    for detail in error.errors():
        if detail["type"] != "default_factory_not_called":
            keys = keys_in(data, detail["loc"])
            by_path.setdefault(".".join(keys), []).append(_sentence(detail, keys, model))
    return [Problem(path, _joined(messages)) for path, messages in by_path.items()]


def joined(problems: Iterable[Problem]) -> list[Problem]:
    """One problem per key."""
    by_path: dict[str, list[str]] = {}
    for path, message in problems:
        by_path.setdefault(path, []).append(message)
    return [Problem(path, _joined(messages)) for path, messages in by_path.items()]


def bad_paths(
    error: ValidationError, data: dict[str, Any], model: type[BaseModel]
) -> dict[tuple[str, ...], set[str]]:
    """Keys that pydantic refused, each with the names of fields
    whose values are in doubt with it: its own, or the one that an unknown key may have been meant to be."""
    found: dict[tuple[str, ...], set[str]] = {}
    for detail in error.errors():
        if detail["type"] == "default_factory_not_called":
            continue
        keys = keys_in(data, detail["loc"])
        names = {keys[-1]} if keys else set()
        if detail["type"] == "extra_forbidden":
            near = nearest_key(keys, model, _stage_tag(detail), _arm(detail))
            names = {near} if near is not None else set()
        found.setdefault(tuple(keys), set()).update(names)
    return found


def _joined(messages: list[str]) -> str:
    """Arms of a union say `'x' is not A` each: one sentence names all of them."""
    unique = list(dict.fromkeys(messages))
    if len(unique) == 1:
        return unique[0]
    heads = {message.split(" is not ", 1)[0] for message in unique}
    if len(heads) == 1 and all(" is not " in message for message in unique):
        return f"{heads.pop()} is not " + " or ".join(m.split(" is not ", 1)[1] for m in unique)
    return "; ".join(unique)


def keys_in(data: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The user's own keys in an error's location, without the names of a union's arms."""
    keys: list[str] = []
    node = data
    if len(loc) > 2 and loc[-3] == "rewards":  # An entry as a whole: the last part is the tag of its kind.
        loc = loc[:-1]
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(node, dict):
            if part in node or (last and isinstance(part, str)):
                keys.append(str(part))
                node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            keys.append(str(part))
            node = node[part] if part < len(node) else None
    return keys


def _sentence(detail: ErrorDetails, keys: list[str], model: type[BaseModel]) -> str:
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(keys, value, model, _stage_tag(detail), _arm(detail))
    if kind == "missing":
        about = description(model, keys)
        return f"missing{f' ({about})' if about else ''}"
    if kind in ("literal_error", "enum"):
        choices = _literals(context["expected"])
        named = next((key for key in reversed(keys) if not key.isdigit()), "")
        alone, words = _only_element(value), _words(value)
        instead = f"; write {alone}" if alone in choices else _instead_of(named, value, choices)
        if words and set(words) <= set(choices):
            instead = f"; write {_in_yaml(words)}"
        return f"{_shown(value)} is not one of {', '.join(choices)}{instead}"
    if kind == "union_tag_not_found":
        choices = stage_types(model)
        near = did_you_mean(keys[-1], choices)
        return f"its name is no type of stage{near}; add `type:` ({' or '.join(choices)})"
    if kind == "union_tag_invalid":
        choices = stage_types(model)
        given = str(context["tag"])
        return f"type '{given}' is not one of {', '.join(choices)}{_instead_of('type', given, choices)}"
    if kind in _TYPES:
        return f"{_shown(value)} is not {_TYPES[kind]}{_right_form(kind, value)}"
    if kind in _BOUNDS:
        key, word = _BOUNDS[kind]
        return f"{_shown(value)} must be {word} {context[key]:g}"
    if kind == "string_pattern_mismatch":
        return f"{_shown(value)}: {NAME_RULE}"
    if kind in ("too_short", "string_too_short"):
        return "is empty"
    return detail["msg"].removeprefix("Value error, ")


def _stage_tag(detail: ErrorDetails) -> str | None:
    """Type of the stage that an error lies in."""
    loc = detail["loc"]
    return str(loc[2]) if len(loc) > 2 and loc[0] == "stages" else None


def _arm(detail: ErrorDetails) -> str | None:
    """Tag of the entry of `rewards:` that an error lies in."""
    loc = detail["loc"]
    return str(loc[-2]) if len(loc) > 3 and loc[-4] == "rewards" else None


def unknown_key(
    keys: list[str],
    value: Any,
    model: type[BaseModel],
    stage_type: str | None = None,
    arm: str | None = None,
) -> str:
    """Sentence on a key that does not exist, with what to write instead."""
    key = keys[-1]
    if key in INSTEAD:
        return f"unknown key; {INSTEAD[key].format(value=value)}"
    here = fields_at(model, keys[:-1], stage_type, arm)
    homes = [path for path in all_paths(model) if path.rsplit(".", 1)[-1] == key]
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.75)
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    own = _home_in_stage(keys, model, stage_type) if stage_type is not None else None
    if own is not None or homes:
        return f"unknown key here; it belongs to {own or _home_elsewhere(homes[0], keys, model)}"
    near = difflib.get_close_matches(key, here, n=1)
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    if len(here) > SHOWN_KEYS:
        stages = f" --stages {stage_type}" if stage_type is not None else ""
        return f"unknown key; `raylign init FILE{stages}` writes every key of this section with its meaning"
    return f"unknown key; possible: {', '.join(here)}"


def _home_in_stage(keys: list[str], model: type[BaseModel], stage_type: str) -> str | None:
    """Where a key belongs within the stage in which it was written elsewhere; None: nowhere in it."""
    key, stage = keys[-1], ".".join(keys[:2])
    here = ".".join(part for part in keys[2:-1] if not part.isdigit())
    homes = []
    for owner in models_at(model, keys[:2]):
        if owner.model_fields["type"].default != stage_type:
            continue
        for path in all_paths(owner):
            section, _, name = path.rpartition(".")
            if name != key or section == here:
                continue
            field = owner.model_fields.get(section)
            # A section of sources may be a plain string, which has no place for keys.
            sources = field is not None and any(get_origin(arm) is list for arm in arms(field.annotation))
            whole = "source: ..." if key == "source" else f"source: ..., {key}: ..."
            homes.append(f"`{stage}.{path}`" + (f", as in `{section}: {{{whole}}}`" if sources else ""))
    own = [home for home in homes if ".eval_data." not in home] or homes
    return ", or to ".join(own) or None


def _home_elsewhere(home: str, keys: list[str], model: type[BaseModel]) -> str:
    """Where a key belongs that the section's own stage has no place for."""
    if len(keys) < 3 or keys[0] != "stages" or not home.startswith("stages.STAGE."):
        return f"`{home}`"
    path = home.removeprefix("stages.STAGE.")
    top = path.split(".")[0]
    kinds = [m.model_fields["type"].default for m in models_at(model, keys[:2]) if top in m.model_fields]
    of = f"stages of type {_listed(kinds)}"
    return f"`{of}`" if path == top else f"`{path}` of {of}"


def nearest_key(
    keys: list[str], model: type[BaseModel], stage_type: str | None = None, arm: str | None = None
) -> str | None:
    """The name that an unknown key may have been meant to be, in its own section."""
    near = difflib.get_close_matches(keys[-1], fields_at(model, keys[:-1], stage_type, arm), n=1)
    return near[0] if near else None


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _instead_of(key: str, value: Any, choices: Iterable[str]) -> str:
    known = INSTEAD_OF_VALUE.get((key, str(value)))
    return f"; {known}" if known is not None else did_you_mean(str(value), choices)


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no choice is near."""
    near = difflib.get_close_matches(value, list(choices), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= SHOWN_TEXT else f"'{value[:SHOWN_TEXT]}...'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_SCALARS: dict[str, type | tuple[type, ...]] = {
    "int_type": int,
    "float_type": (int, float),
    "bool_type": bool,
    "string_type": str,
    "path_type": str,
    "is_instance_of": str,
}
"""Kind of error -> the values that would be right."""


_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Words for true and false, which YAML 1.2 reads as text."""


def _right_form(kind: str, value: Any) -> str:
    """`; write ...` with the same value in the form that its key wants, where there is one."""
    if kind == "list_type" and isinstance(value, str | int | float):
        return f"; write {_in_yaml(_words(value) or [value])}"
    alone = _only_element(value)
    if kind in _SCALARS and isinstance(alone, _SCALARS[kind]):
        return f"; write {_in_yaml(alone)}"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in _WORDS:
        return f"; write {_in_yaml(_WORDS[value.lower()])}"
    if kind == "string_type" and isinstance(value, int | float | bool):
        return f"; put it in quotes: '{_shown(value)}'"
    if kind in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        return "; take the quotes off"
    return ""


def _words(value: Any) -> list[str]:
    """Words of a text with commas between them; empty for anything else."""
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else []
    return words if len(words) > 1 and all(words) else []


def _only_element(value: Any) -> Any:
    """What a list of one element has; None for anything else."""
    return value[0] if isinstance(value, list) and len(value) == 1 else None


def _in_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    return (json.dumps(value, ensure_ascii=False) if "\n" in text else text)[:SHOWN_TEXT]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _literals(expected: str) -> list[str]:
    return [part for part in expected.replace("' or '", "', '").strip("'").split("', '") if part]

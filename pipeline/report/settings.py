"""Settings of a run as texts: the notable ones for people, and all of them by key. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.report.tolerant_reading import as_mapping, as_number

ALSO = (
    "teacher",
    "max_length",
    "max_completion_length",
    "num_generations",
    "steps_per_generation",
    "num_iterations",
    "temperature",
    "beta",
    "loss_type",
    "epsilon",
    "train_on",
    "staleness",
    "critic_learning_rate",
    "center_rewards_coefficient",
)
"""Keys of a stage that are shown besides its data, length, batch and learning rate, where it has them."""

TEXT_LIMIT = 80
"""Characters of one value."""

DEPTH = 12
"""Levels of keys; what lies deeper is one value. A run's own settings have six."""


@dataclass(frozen=True)
class StageSettings:
    """One stage's line in the table of settings, as texts."""

    name: str
    data: str
    length: str
    batch: str
    rate: str
    also: list[str]


@dataclass(frozen=True)
class Settings:
    """The notable settings of a run: facts of all stages, and a line a stage."""

    facts: list[tuple[str, str]]
    stages: list[StageSettings]


def settings(config: Mapping[str, Any]) -> Settings:
    """The notable settings of a resolved config; of an older or damaged one, what it has."""
    model = as_mapping(config.get("model"))
    lora = as_mapping(model.get("lora"))
    roles = {name: as_mapping(role).get("workers") for name, role in as_mapping(config.get("roles")).items()}
    if not any(_serves_judge(stage) for stage in as_mapping(config.get("stages")).values()):
        roles.pop("judge", None)  # The one role that stands in every run and works in few.
    facts = [
        ("base", value_text(model.get("base"))),
        ("dtype", value_text(model.get("dtype"))),
        ("LoRA", _pairs(lora, ("r", "lora_alpha", "targets")) or ("none" if "lora" in model else "")),
        ("processes", ", ".join(f"{name} {value_text(count)}" for name, count in roles.items() if count)),
        ("seed", value_text(config.get("seed"))),
    ]
    stages = as_mapping(config.get("stages"))
    return Settings(
        [(name, text) for name, text in facts if text],
        [_stage(str(name), as_mapping(stage)) for name, stage in stages.items() if as_mapping(stage)],
    )


def _stage(name: str, stage: dict[str, Any]) -> StageSettings:
    steps, epochs = as_number(stage.get("max_steps")), as_number(stage.get("num_train_epochs"))
    length = f"{epochs:g} epochs" if epochs is not None else ""
    also = [f"{key} {value_text(stage[key])}" for key in ALSO if _says_something(stage.get(key))]
    rewards = ", ".join(_reward(one) for one in _listed(stage.get("rewards")))
    return StageSettings(
        name,
        data=", ".join(_source(one) for one in _listed(stage.get("data"))),
        length=f"{steps:g} steps" if steps is not None and steps > 0 else length,
        batch=value_text(stage.get("batch_size")),
        rate=f"{value_text(stage.get('learning_rate'))} {value_text(stage.get('lr_scheduler_type'))}".strip(),
        also=[*([f"rewards {rewards}"] if rewards else []), *also],
    )


def flat(config: Any, above: str = "", depth: int = DEPTH) -> Iterator[tuple[str, str]]:
    """Every setting as (dotted key, text); items of a list of mappings have their number as a key."""
    items: list[tuple[str, Any]] = []
    if isinstance(config, Mapping):
        items = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, list) and any(isinstance(one, Mapping) for one in config):
        items = [(str(at), value) for at, value in enumerate(config)]
    if not items or not depth:
        yield above, value_text(config)
        return
    for key, value in items:
        yield from flat(value, f"{above}.{key}" if above else key, depth - 1)


def value_text(value: Any) -> str:
    """A setting as it would be written, in one line of at most TEXT_LIMIT characters; None is empty."""
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, list):
        text = ", ".join(value_text(one) for one in value[:TEXT_LIMIT])
    elif isinstance(value, float):
        text = f"{value:g}" if math.isfinite(value) else str(value)
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int):
        text = f"{value:d}" if abs(value) < 10**TEXT_LIMIT else "a number of more than 80 digits"
    else:
        text = str(value)
    return text if len(text) <= TEXT_LIMIT else f"{text[: TEXT_LIMIT - 1]}…"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _says_something(value: Any) -> bool:
    return value is not None and value != [] and not (isinstance(value, (int, float)) and value == 0)


def _pairs(values: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return ", ".join(f"{key} {value_text(values[key])}" for key in keys if value_text(values.get(key)))


def _source(one: Any) -> str:
    """A source of data: `builtin:arithmetic (train)`."""
    source = as_mapping(one)
    if not source:
        return value_text(one)
    split = value_text(source.get("split"))
    return value_text(source.get("source")) + (f" ({split})" if split else "")


def _serves_judge(stage: Any) -> bool:
    """True where a reward of a stage is a judge without an endpoint."""
    rewards = [as_mapping(one) for one in _listed(as_mapping(stage).get("rewards"))]
    return any(one.get("kind") == "judge" and not one.get("endpoint") for one in rewards)


def _reward(one: Any) -> str:
    """A source of rewards, with its weight where it isn't 1."""
    source = as_mapping(one)
    if not source:
        return value_text(one)
    weight = value_text(source.get("weight"))
    where = next((key for key in ("endpoint", "url", "sandbox", "model") if source.get(key)), "")
    parts = [value_text(source.get(key)) for key in ("kind", "source", where)]
    return " ".join(part for part in parts if part) + (f" x {weight}" if weight not in ("", "1") else "")

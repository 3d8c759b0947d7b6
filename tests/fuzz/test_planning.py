"""Whatever a config that loads asks for, `validate` lists what is wrong or what it will need."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import strategies as st

from actors.errors import UserError
from actors.models.spec import locate_embedded_base
from pipeline.api import plan, validate
from pipeline.config.fields import all_paths, arms, models_at
from pipeline.config.load import load_mapping
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_reader import NoPlaceError, set_key
from pipeline.planning.dry_run import shrink
from pipeline.stages.specs.registry import STAGE_TYPES
from tests.fuzz.harness import Feed
from tests.fuzz.strategies import ODD_NUMBERS, scalars, texts, values

HUGE = [10**6, 10**9, 10**12, 10**18, 2**31, 2**63 - 1, 1e9, 1e18, 1e300, 1e-300, 5e-324]
PLACES = [
    *(
        "",
        ".",
        "/",
        "~",
        "..",
        "a" * 300,
        "a\0b",
        "runs/x",
        "org/name",
        "\ud800",
        "builtin:",
        "m:f",
        "os:sep",
    ),
    *("/dev/null", "/proc/self", "*", "[", "exact_match", "reward", "base", "json:dumps", "a.b.c:d"),
]


def good(tmp_path: Path, kind: str) -> dict[str, Any]:
    """A small run of one type of stage after SFT."""
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"{i}+1?", "answer": f"{i + 1}"}) + "\n" for i in range(4))
    )
    rows = ({"prompt": "a", "chosen": f"b{i}", "rejected": "c"} for i in range(4))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"source": str(pairs)}]
    stage: dict[str, Any] = {"type": kind, "data": sources, "eval_data": sources[0]}
    if STAGE_TYPES[kind].online:
        stage = {"type": kind, "data": str(prompts), "rewards": [{"source": "exact_match"}], "max_length": 64}
        stage |= {"max_completion_length": 8}
    elif kind == "sft":
        stage = {"type": kind, "data": [{"source": str(prompts)}]}
    return {
        "name": "a",
        "output_dir": str(tmp_path / "out"),
        "model": {"base": locate_embedded_base()},
        "stages": {"it": stage},
        "eval": {"data": str(prompts)},
    }


def checked(data: dict[str, Any]) -> None:
    """All that looks at a run before it starts."""
    found = validate(data)
    config = None
    try:
        config = load_mapping(data)
    except UserError:
        assert found.problems
        raise
    plan(config)
    shrink(config)
    if found.problems:
        raise UserError(found.problems)


@pytest.mark.parametrize("kinds", [["sft", "dpo", "kto", "reward"], ["ppo", "grpo", "rloo", "online_dpo"]])
def test_odd_settings_through_validate(
    feed: Feed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    starts = [good(tmp_path, kind) for kind in kinds]
    paths = {kind: [path.replace("STAGE", "it").split(".") for path in all_paths_of(kind)] for kind in kinds}

    @st.composite
    def changed(draw: st.DrawFn) -> dict[str, Any]:
        kind = draw(st.sampled_from(kinds))
        data = starts[kinds.index(kind)]
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(paths[kind]))
            with suppress(NoPlaceError):
                data = set_key(data, path, draw(st.one_of(*[fitting(path)] * 3, anything())))
        return data

    feed(checked, changed(), inputs=12)


def anything() -> st.SearchStrategy[Any]:
    """Values of any kind, under whatever key."""
    return values(st.one_of(scalars(), st.sampled_from(PLACES)), texts())


def fitting(path: list[str]) -> st.SearchStrategy[Any]:
    """Values of a key's own type, which only its rules and the machine can refuse."""
    found = [arm for annotation in annotations(path) for arm in arms(annotation)]
    fits: list[st.SearchStrategy[Any]] = []
    for arm in found:
        if get_origin(arm) is Literal:
            fits.append(st.sampled_from(get_args(arm)))
        elif arm is bool:
            fits.append(st.booleans())
        elif arm in (int, float):
            fits.append(st.sampled_from([*HUGE, *ODD_NUMBERS]).map(lambda n, arm=arm: _as(arm, n)))
        elif arm in (str, Path):
            fits.append(st.sampled_from(PLACES))
        elif get_origin(arm) is list:
            fits.append(st.lists(st.sampled_from([*PLACES, *HUGE]), max_size=3))
    return st.one_of(fits) if fits else anything()


def _as(kind: type, number: float) -> float:
    return int(number) if kind is int and math.isfinite(number) else float(number)


def annotations(path: list[str]) -> list[Any]:
    owners = models_at(RunConfig, path[:-1])
    return [owner.model_fields[path[-1]].annotation for owner in owners if path[-1] in owner.model_fields]


def all_paths_of(kind: str) -> list[str]:
    """Keys of a run with a stage of this type."""
    own = [f"stages.STAGE.{path}" for path in all_paths(STAGE_TYPES[kind])]
    return [path for path in all_paths(RunConfig) if not path.startswith("stages.STAGE.")] + 2 * own

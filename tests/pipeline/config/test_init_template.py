"""The starter config and the JSON schema say what the specs say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from pipeline.config.init_template import starter
from pipeline.config.json_schema import json_schema
from pipeline.config.load import load_config, validate
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_reader import parse_yaml
from pipeline.stages.specs.registry import STAGE_TYPES


def test_the_starter_is_a_valid_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(starter("my-run", "some/base"))
    run = load_config(path)
    assert (run.name, run.model.base, list(run.stages)) == ("my-run", "some/base", ["sft", "dpo"])


@pytest.mark.parametrize("stages", [["sft", "dpo"], ["sft", "reward", "dpo", "ppo"], ["rloo", "grpo"]])
def test_every_commented_default_is_valid_when_uncommented(stages: list[str]) -> None:
    text = starter("my-run", "some/base", stages)
    field = re.compile(r"^( *)# ([a-z_0-9]+: .*)$", re.MULTILINE)
    body = text[text.index("name: my-run") :]
    uncommented = field.sub(r"\1\2", body).replace("output_dir: runs/NAME", "output_dir: runs/my-run")
    data = parse_yaml(uncommented)
    data["eval"].pop("models")
    config, problems = validate(data)
    assert not problems
    shown, _ = validate(parse_yaml(text))
    assert config == shown, "a commented default differs from the real one"


@pytest.mark.parametrize("kind", STAGE_TYPES)
def test_every_field_of_a_stage_is_in_its_starter(kind: str) -> None:
    text = starter("my-run", "some/base", [kind])
    for name in set(STAGE_TYPES[kind].model_fields) - {"type"}:
        assert re.search(rf"^ +(# )?{name}: ", text, re.MULTILINE), name


def test_a_starter_with_a_reward_model_rewards_by_it() -> None:
    rewarded = parse_yaml(starter("a", "b", ["reward", "ppo"]))["stages"]["ppo"]["rewards"]
    ruled = parse_yaml(starter("a", "b", ["ppo", "reward"]))["stages"]["ppo"]["rewards"]
    assert (rewarded, ruled) == (["reward"], ["exact_match"])


def test_a_starter_of_stages_that_do_not_exist_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        starter("a", "b", ["sft", "pop", "sft"])
    assert [p.split(";")[0] for p in caught.value.problems] == [
        "--stages: 'pop' is no type of stage",
        "--stages: 'sft' is named twice",
    ]


@pytest.fixture(scope="module")
def check() -> object:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(json.dumps(json_schema()))
    return jsonschema.Draft202012Validator(schema)


def test_editors_accept_what_the_loader_accepts(check: object) -> None:
    short: dict[str, Any] = {
        "name": "a",
        "model": {"base": "b", "lora": None},
        "stages": {
            "sft": {"data": "x"},
            "dpo": {"data": ["x", {"source": "y", "weight": 2}], "loss_type": ["sigmoid", "sft"]},
            "polish": {"type": "sft", "data": {"source": "x"}, "packing": True},
        },
        "eval": {"data": "held"},
    }
    for kind in ("ppo", "grpo", "rloo"):
        short["stages"][kind] = {"data": "x", "rewards": ["exact_match", {"source": "m:f", "on_error": 0}]}
    short["stages"]["again"] = {"type": "ppo", "data": "x", "rewards": "exact_match"}
    for data in (parse_yaml(starter("my-run", "some/base")), short):
        assert validate(data)[0] is not None or data is short
        assert not list(check.iter_errors(data))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "stages",
    [
        {"sft": {"data": "x", "beta": 1}},
        {"polish": {"data": "x"}},
        {"sft": {"type": "dpo", "data": "x"}},
        {"ppo": {"data": "x"}},
        {},
    ],
)
def test_editors_refuse_what_the_loader_refuses(check: object, stages: dict[str, object]) -> None:
    data = {"name": "a", "model": {"base": "b"}, "stages": stages}
    assert list(check.iter_errors(data))  # type: ignore[attr-defined]


def test_every_field_has_a_docstring() -> None:
    schema = json_schema()
    for name, model in {"RunConfig": schema, **schema["$defs"]}.items():
        for field, about in model.get("properties", {}).items():
            assert about.get("description") or "$ref" in about, f"{name}.{field}"


def test_the_run_config_has_the_sections_of_the_design() -> None:
    assert {"name", "output_dir", "seed", "model", "stages", "roles", "logging", "limits"} <= set(
        RunConfig.model_fields
    )

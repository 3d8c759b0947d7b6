"""The starter config and the JSON schema say what the specs say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from actors.models.spec import EMBEDDED_BASE, locate_embedded_base
from pipeline.config.init_template import starter
from pipeline.config.json_schema import json_schema
from pipeline.config.load import load_config, validate
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_reader import parse_yaml
from pipeline.data.spec import PLACEHOLDER
from pipeline.stages.specs.registry import STAGE_TYPES


def test_the_starter_is_a_valid_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(starter("my-run", "some/base"))
    run = load_config(path)
    assert (run.name, run.model.base, list(run.stages)) == ("my-run", "some/base", ["sft", "dpo"])


@pytest.mark.parametrize("base", ["some/base", EMBEDDED_BASE])
@pytest.mark.parametrize("stages", [["sft", "dpo"], ["sft", "reward", "dpo", "ppo"], ["rloo", "grpo"]])
def test_every_commented_default_is_valid_when_uncommented(stages: list[str], base: str) -> None:
    text = starter("my-run", base, stages)
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


def test_the_starter_of_the_embedded_base_is_a_small_run_on_built_in_data(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(starter("my-run", EMBEDDED_BASE, list(STAGE_TYPES), gpus=8))
    run = load_config(path)
    assert {source.source for stage in run.stages.values() for source in stage.data} == {"builtin:arithmetic"}
    assert all(0 < stage.max_steps <= 100 for stage in run.stages.values())
    assert (run.model.dtype, run.roles.policy.gpus, "# On GPUs" in path.read_text()) == ("float32", 0, False)
    (tmp_path / "beside.yaml").write_text(starter("my-run", str(Path(locate_embedded_base()).absolute())))
    assert load_config(tmp_path / "beside.yaml").stages["sft"].data[0].source == "builtin:arithmetic"


def test_the_starter_of_another_base_goes_by_epochs_at_rates_for_adapters(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(starter("my-run", "some/base", list(STAGE_TYPES)))
    run = load_config(path)
    rates = {name: stage.learning_rate for name, stage in run.stages.items()}
    assert rates["sft"] == rates["reward"] == 1e-4
    assert {rates[kind] for kind in STAGE_TYPES} == {1e-4, 1e-5, 5e-6}
    assert rates["dpo"] == rates["grpo"] == 1e-5
    for stage in run.stages.values():
        assert stage.max_steps == -1
        assert 1 <= stage.num_train_epochs <= 3
        assert stage.max_length == 2048
        assert not stage.online or stage.max_completion_length == 1024
    assert run.eval is not None
    assert run.eval.sampling.max_tokens == 1024
    sources = [*run.eval.data, *(source for stage in run.stages.values() for source in stage.data)]
    assert all(PLACEHOLDER.fullmatch(source.source) for source in sources)


@pytest.mark.parametrize(
    ("gpus", "dtype", "each"), [(0, "float32", 0), (1, "float32", 0), (2, "bfloat16", 1)]
)
def test_bfloat16_and_gpus_are_set_where_trainer_and_engine_have_one_each_and_else_told(
    tmp_path: Path, gpus: int, dtype: str, each: int
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(starter("my-run", "some/base", gpus=gpus))
    run = load_config(path)
    assert (run.model.dtype, run.roles.policy.gpus, run.roles.rollout.gpus) == (dtype, each, each)
    assert path.read_text().count("# On GPUs: dtype: bfloat16") == (not each)
    assert path.read_text().count("# On GPUs: gpus: 1") == 2 * (not each)


def test_a_dense_base_has_no_experts_to_adapt(tmp_path: Path) -> None:
    for model_type, targets in (("llama", ["attention", "mlp"]), ("olmoe", ["attention", "experts"])):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert parse_yaml(starter("a", str(tmp_path)))["model"]["lora"]["targets"] == targets


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
    nameless = {key: value for key, value in short.items() if key != "name"}
    assert not list(check.iter_errors(nameless)), "a file has a name"  # type: ignore[attr-defined]
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

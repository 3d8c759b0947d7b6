"""Reading a run's YAML: every violation at once, the nearest valid name, what to write instead."""

from __future__ import annotations

import ast
import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.errors import UserError
from actors.models.spec import ModelSpec, MoeSpec
from pipeline.config.load import dump_config, load_config, load_mapping, validate
from pipeline.config.run_config import RunConfig
from pipeline.config.trl_keys import INSTEAD
from pipeline.config.yaml_reader import parse_yaml, set_key
from pipeline.monitoring.spec import LoggingSpec
from pipeline.stages.specs.registry import STAGE_TYPES

GOOD: dict[str, Any] = {
    "name": "a-run",
    "model": {"base": "some/base"},
    "stages": {"sft": {"data": "rows.jsonl"}, "dpo": {"data": ["pairs.jsonl"]}},
}


def config(**changes: Any) -> RunConfig:
    loaded, problems = validate({**copy.deepcopy(GOOD), **changes})
    assert loaded is not None, problems
    return loaded


def problems_of(**changes: Any) -> dict[str, str]:
    loaded, problems = validate({**copy.deepcopy(GOOD), **changes})
    assert loaded is None
    assert len({p.path for p in problems}) == len(problems), "one problem per key"
    return {p.path: p.message for p in problems}


def of_sft(**keys: Any) -> dict[str, str]:
    return problems_of(stages={"sft": {"data": "rows.jsonl", **keys}})


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_a_short_config_is_enough() -> None:
    run = config()
    assert str(run.output_dir) == "runs/a-run"
    assert run.stages["sft"].type == "sft"
    assert run.stages["dpo"].data[0].source == "pairs.jsonl"
    assert run.roles.reference.share == "policy"
    assert (run.init_of("sft"), run.init_of("dpo"), run.reference_of("dpo")) == ("base", "sft", "sft")


def test_defaults_are_the_trainers_own() -> None:
    run = config()
    sft, dpo = run.stages["sft"], run.stages["dpo"]
    assert (sft.learning_rate, dpo.learning_rate) == (2e-5, 1e-6)
    assert (sft.num_train_epochs, sft.max_length, sft.max_grad_norm) == (3.0, 1024, 1.0)
    assert (dpo.beta, dpo.loss_type, dpo.f_divergence_type) == (0.1, ["sigmoid"], "reverse_kl")


def test_shared_fields_have_the_names_that_the_installed_trl_gives_them() -> None:
    trl = pytest.importorskip("trl")
    from pipeline.stages.specs.registry import DpoStage, SftStage

    ours = {
        "init", "data", "eval_data", "batch_size", "shuffle", "max_tokens_per_micro_batch",
        "keep_warm", "save_minutes", "type", "train_on", "reference",
    }  # fmt: skip
    for spec, theirs in ((SftStage, trl.SFTConfig), (DpoStage, trl.DPOConfig)):
        shared = set(spec.model_fields) - ours
        if spec is DpoStage:
            shared -= {"packing"}
        assert shared <= set(theirs.__dataclass_fields__), spec


def test_what_is_dumped_loads_back_into_the_same_run() -> None:
    for run in (config(), config(model={"base": "b", "lora": None}), config(eval={"data": "held.jsonl"})):
        again, problems = validate(parse_yaml(dump_config(run)))
        assert not problems
        assert again == run


def test_full_fine_tuning_gives_the_reference_its_own_actors() -> None:
    run = config(model={"base": "b", "lora": None})
    assert (run.roles.reference.share, run.roles.reference.workers) == (None, 1)


def test_every_violation_is_reported_at_once() -> None:
    problems = problems_of(
        seeed=3,
        name=2024,
        model={"base": "b", "lora": {"lora_alfa": 3, "r": "8"}},
        stages={
            "sft": {"data": "x", "batch_size": 0},
            "dpo": {"data": "x", "loss_type": "sigmod"},
            "p": {"data": "x"},
        },
        roles={"policy": {"worker": 2}},
    )
    assert problems["seeed"] == "unknown key; did you mean `seed`?"
    assert problems["name"] == "2024 is not text; put it in quotes: '2024'"
    assert problems["model.lora.lora_alfa"].endswith("did you mean `lora_alpha`?")
    assert problems["model.lora.r"] == "'8' is not a whole number; take the quotes off"
    assert problems["stages.sft.batch_size"] == "0 must be at least 1"
    assert problems["stages.dpo.loss_type"].endswith("did you mean 'sigmoid'?")
    assert "add `type:`" in problems["stages.p"]
    assert problems["roles.policy.worker"].endswith("did you mean `workers`?")
    assert len(problems) == 8


def test_rules_between_fields_are_checked_beside_bad_keys() -> None:
    problems = problems_of(
        seeed=3,
        stages={"sft": {"data": "x", "batch_size": 0}, "dpo": {"data": "x", "loss_type": "exo_pair"}},
    )
    assert set(problems) == {"seeed", "stages.sft.batch_size", "stages.dpo.label_smoothing"}


GRPO: dict[str, Any] = {"type": "grpo", "data": "x", "rewards": "exact_match"}


def test_rules_beside_a_bad_key_of_the_same_section_are_checked_where_they_do_not_name_it() -> None:
    wrong = {"max_completion_length": 16, "soft_punish_cache": 20, "num_generations": 7}
    unknown = problems_of(stages={"rl": {**GRPO, **wrong, "wholly_unknown": 1}})
    assert set(unknown) == {
        "stages.rl." + key for key in ("soft_punish_cache", "num_generations", "wholly_unknown")
    }
    bad = problems_of(stages={"rl": {**GRPO, **wrong, "max_completion_length": 0, "epsilon": 2}})
    assert set(bad) == {f"stages.rl.{key}" for key in ("max_completion_length", "num_generations", "epsilon")}
    # The name that was meant is not held against the default that stands in for it.
    meant = problems_of(stages={"rl": {**GRPO, "loss_type": "cispo", "epsilon_hihg": 5.0}})
    assert set(meant) == {"stages.rl.epsilon_hihg"}


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        ({"loss_type": "gspo"}, "`importance_sampling_level: sequence`"),
        ({"vllm_importance_sampling_mode": "icepop"}, "token_mask"),
        ({"scale_rewards": True}, "`scale_rewards: group`"),
        ({"vllm_importance_sampling_cap": 2.0}, "`vllm_importance_sampling_clip_max: 2.0`"),
        ({"fsdp": "full_shard"}, "`roles.policy.sharding`"),
        ({"max_staleness": 1}, "`staleness: 1`"),
        ({"no_such_key_at_all": 1}, "`raylign init FILE --stages grpo`"),
    ],
)
def test_values_and_keys_known_by_other_names_are_answered(keys: dict[str, Any], answer: str) -> None:
    (message,) = problems_of(stages={"rl": {**GRPO, **keys}}).values()
    assert answer in message
    assert len(message) < 250


def declared(path: Path) -> set[str]:
    """Fields that the dataclasses of a file declare; read, not imported."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    lines = [line for one in classes for line in one.body if isinstance(line, ast.AnnAssign)]
    return {line.target.id for line in lines if isinstance(line.target, ast.Name)}


@pytest.mark.parametrize("trainer", ["sft", "dpo", "kto", "reward", "grpo", "rloo"])
def test_every_key_of_trls_trainers_has_an_answer_or_is_ours(trainer: str) -> None:
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.origin is not None
    theirs = declared(Path(found.origin).parent / "trainer" / f"{trainer}_config.py")
    ours = {name for stage in STAGE_TYPES.values() for name in stage.model_fields} | set(INSTEAD)
    ours |= {name for spec in (ModelSpec, MoeSpec, LoggingSpec) for name in spec.model_fields}
    assert len(theirs) > 10
    assert theirs <= ours, theirs - ours


def test_keys_of_trl_are_answered_with_what_to_write_instead() -> None:
    problems = of_sft(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, warmup_ratio=0.1, report_to="wandb"
    )
    assert "`batch_size`" in problems["stages.sft.per_device_train_batch_size"]
    assert "`batch_size`" in problems["stages.sft.gradient_accumulation_steps"]
    assert "`warmup_steps: 0.1`" in problems["stages.sft.warmup_ratio"]
    assert "`logging.report_to`" in problems["stages.sft.report_to"]


def test_a_key_in_the_wrong_section_is_told_where_it_belongs() -> None:
    problems = problems_of(beta=0.1, model={"base": "b", "lora_alpha": 3})
    assert problems["model.lora_alpha"].endswith("belongs to `model.lora.lora_alpha`")
    assert problems["beta"].endswith("belongs to `stages.STAGE.beta`")
    with_beta = [name for name, stage in STAGE_TYPES.items() if "beta" in stage.model_fields]
    listed = f"{', '.join(with_beta[:-1])} and {with_beta[-1]}"
    assert of_sft(beta=0.1)["stages.sft.beta"].endswith(f"belongs to `stages of type {listed}`")


@pytest.mark.parametrize("value", ["32", True, 1.5, None, [32]])
def test_a_number_of_the_wrong_type_is_refused(value: Any) -> None:
    assert "is not a whole number" in of_sft(batch_size=value)["stages.sft.batch_size"]


def test_what_a_union_refuses_is_one_problem() -> None:
    assert of_sft(packing="maybe") == {"stages.sft.packing": "'maybe' is not one of auto or true or false"}


def test_a_single_data_source_keeps_the_path_that_the_user_wrote() -> None:
    assert set(of_sft(data={"source": "x", "max_row": 1})) == {"stages.sft.data.max_row"}
    assert set(of_sft(data=[{"source": "x"}, {"split": "a"}])) == {"stages.sft.data.1.source"}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_numbers_are_yaml_1_2(text: str) -> None:
    assert parse_yaml(f"x: {text}") == {"x": 1e-4}


def test_no_and_dates_are_text() -> None:
    assert parse_yaml("a: no\nb: on\nc: 2024-01-01\nd: 1_000\ne: null") == {
        "a": "no", "b": "on", "c": "2024-01-01", "d": "1_000", "e": None
    }  # fmt: skip


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", GOOD)
    run = load_config(
        path,
        [
            "stages.sft.learning_rate=1e-3",
            "model.lora=null",
            "stages.sft.data.max_rows=9",
            "roles.policy.workers=2",
        ],
    )
    assert run.stages["sft"].learning_rate == 1e-3
    assert run.model.lora is None
    assert (run.stages["sft"].data[0].source, run.stages["sft"].data[0].max_rows) == ("rows.jsonl", 9)
    assert run.roles.policy.workers == 2


def test_bad_overrides_are_listed_with_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", GOOD)
    with pytest.raises(UserError) as caught:
        load_config(path, ["seed", "seed.x=1", "stages.dpo.data.7.split=a", "x=[", "stages.sft.batch_sise=1"])
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "'seed' is not key=value" in text
    assert "did you mean `batch_size`?" in text
    assert "stages.dpo.data is a list of 1" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("- a", "a list"),
        ("a: b: c", "line 1"),
        ("name: a\nname: b", "'name' is given twice"),
        ("a: [1", "line"),
        ("a: &x {b: *y}", "undefined alias"),
        ("? {a: b}\n: c", "a key must be plain text"),
    ],
)
def test_what_is_no_mapping_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path / "run.yaml", text))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("a: 1")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(UserError, match=r"no such file.*other\.yaml"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(UserError, match="is a directory"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize("key", sorted(RunConfig.model_fields))
def test_nonsense_at_the_top_is_refused_without_a_crash(key: str) -> None:
    for nonsense in (3, "x", [], {"x": {"y": 1}}, None):
        loaded, problems = validate({**copy.deepcopy(GOOD), key: nonsense})
        assert (loaded is None) == bool(problems)


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("model.lora.targets", "attention", "[attention]"),
        ("model.lora.targets", "attention, experts", "[attention, experts]"),
        ("model.lora.r", [16], "16"),
        ("model.dtype", ["float32"], "float32"),
        ("logging.report_to", "tensorboard", "[tensorboard]"),
        ("stages.grpo.stop", "\n", '["\\n"]'),
        ("stages.grpo.stop_token_ids", 3, "[3]"),
        ("stages.grpo.learning_rate", [1e-3], "0.001"),
        ("stages.grpo.init", ["base"], "base"),
        ("stages.grpo.shuffle", [True], "true"),
        ("stages.grpo.shuffle", "yes", "true"),
        ("stages.grpo.batch_size", 32.0, "32"),
        ("stages.dpo.loss_type", "sigmoid, sft", "[sigmoid, sft]"),
        ("stages.dpo.loss_weights", 1.0, "[1.0]"),
        ("eval.models", "base", "[base]"),
    ],
)
def test_a_value_in_the_wrong_form_is_told_with_the_right_one(key: str, value: Any, right: str) -> None:
    good = {**GOOD, "eval": {"data": "held.jsonl"}}
    good["stages"] = {"grpo": {"data": "x", "rewards": "exact_match"}, "dpo": {"data": "x"}}
    _, problems = validate(set_key(good, key.split("."), value))
    (problem,) = problems
    assert problem.path == key
    assert problem.message.endswith(f"; write {right}")
    assert validate(set_key(good, key.split("."), parse_yaml(right)))[0] is not None


def test_a_value_of_which_no_right_form_is_known_is_told_without(tmp_path: Path) -> None:
    for value in ([1, 2], {"a": 1}, ["x"], [None], []):
        assert "write" not in problems_of(seed=value)["seed"]


def test_the_run_is_named_like_its_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    nameless = {key: value for key, value in GOOD.items() if key != "name"}
    run = load_config(write(tmp_path / "my-run.v2.yaml", nameless))
    assert (run.name, str(run.output_dir)) == ("my-run.v2", "runs/my-run.v2")
    assert parse_yaml(dump_config(run))["name"] == "my-run.v2"
    assert load_config(tmp_path / "my-run.v2.yaml", ["name=other"]).name == "other"
    assert load_config(write(tmp_path / "b.yaml", GOOD)).name == "a-run"
    for file in ("_a.yaml", "a b.yaml", f"{'a' * 101}.yaml"):
        with pytest.raises(
            UserError, match=rf"name: missing, and the file's own, '{file[:-5]}', can't be one"
        ):
            load_config(write(tmp_path / file, {**nameless, "seed": -1}))
    with pytest.raises(UserError, match="name: missing"):
        load_mapping(nameless)


@pytest.mark.parametrize("name", ["a" * 101, "_a", "a b", "a\n", ""])
def test_names_of_runs_and_stages_are_those_of_directories(name: str) -> None:
    assert "up to 100 letters, digits" in problems_of(name=name)["name"]
    said = problems_of(stages={name: {"type": "sft", "data": "x"}})
    assert "up to 100 letters, digits" in said[f"stages.{name}"]

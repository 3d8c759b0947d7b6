"""Settings of a run in its report."""

from __future__ import annotations

from pathlib import Path

from pipeline import load
from pipeline.config.load import resolved
from pipeline.report.settings import ALSO, flat, settings
from pipeline.stages.specs.registry import STAGE_TYPES


def test_the_notable_settings_of_the_demo_are_told(repository: Path) -> None:
    found = settings(resolved(load(repository / "configs" / "demo.yaml")))
    assert [name for name, _ in found.facts] == ["base", "dtype", "LoRA", "processes", "seed"]
    told = dict(found.facts)
    assert told["LoRA"] == "r 16, lora_alpha 32, targets attention, experts"
    assert told["processes"] == "policy 2, reference 1, rollout 1"
    sft, _, dpo, ppo = found.stages
    assert (sft.data, sft.length, sft.batch, sft.rate) == (
        "builtin:arithmetic (train)",
        "100 steps",
        "64",
        "0.001 cosine",
    )
    assert "loss_type sigmoid" in dpo.also
    assert "rewards reward, exact_match x 0" in ppo.also
    assert "staleness 0" not in ppo.also, "what is off is not told"


def test_services_and_the_judge_s_processes_are_told() -> None:
    judge = {"kind": "judge", "model": "org/j", "endpoint": None, "weight": 0.5}
    rewards = [
        {"kind": "http", "url": "http://a/", "weight": 1.0},
        judge,
        {"kind": "math", "column": "answer"},
    ]
    roles = {"policy": {"workers": 1}, "judge": {"workers": 2}}
    found = settings({"stages": {"grpo": {"rewards": rewards}}, "roles": roles})
    assert found.stages[0].also == ["rewards http http://a/, judge org/j x 0.5, math"]
    assert dict(found.facts)["processes"] == "policy 1, judge 2"


def test_a_stage_without_a_number_of_steps_is_as_long_as_its_epochs() -> None:
    found = settings({"stages": {"a": {"max_steps": -1, "num_train_epochs": 1.5}}})
    assert found.stages[0].length == "1.5 epochs"


def test_every_key_that_would_be_told_is_one_of_a_stage() -> None:
    known = {name for spec in STAGE_TYPES.values() for name in spec.model_fields}
    assert set(ALSO) <= known


def test_every_setting_has_a_dotted_key_of_its_own() -> None:
    config = {"a": {"b": [{"c": 1.0}, {"c": None}], "d": ["x", "y"]}, "e": True}
    assert dict(flat(config)) == {"a.b.0.c": "1", "a.b.1.c": "", "a.d": "x, y", "e": "true"}


def test_settings_of_any_shape_are_texts() -> None:
    loop: list[object] = []
    loop.append({"again": loop})
    odd = {
        "model": 3,
        "stages": {"a": {"data": 7, "rewards": {"source": [1]}, "max_steps": 10**400}},
        "seed": 10**9999,
    }
    assert settings(odd).stages[0].data == "7"
    assert all(len(text) <= 90 for _, text in flat({"loop": loop, **odd, "text": "x" * 9999}))

"""Rules between fields: what is refused, and that what is allowed is not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from pipeline.config.load import validate
from pipeline.config.rules.stage import SCHEDULE_ARGUMENTS

BASE: dict[str, Any] = {"name": "a", "model": {"base": "b"}}


def problems_of(stages: dict[str, Any] | None = None, **sections: Any) -> dict[str, str]:
    _, problems = validate({**BASE, "stages": stages or {"sft": {"data": "x"}}, **sections})
    return {p.path: p.message for p in problems}


def dpo(**keys: Any) -> set[str]:
    return {path.removeprefix("stages.dpo.") for path in problems_of({"dpo": {"data": "x", **keys}})}


def test_a_reference_cannot_share_a_base_that_full_fine_tuning_moves() -> None:
    full = {"base": "b", "lora": None}
    assert (
        "moves" in problems_of(model=full, roles={"reference": {"share": "policy"}})["roles.reference.share"]
    )
    assert not problems_of(model=full)
    assert not problems_of(model=full, roles={"reference": {"workers": 2}})


def test_only_the_reference_shares_and_only_with_the_policy() -> None:
    assert set(problems_of(roles={"policy": {"share": "rollout"}})) == {"roles.policy.share"}
    assert set(problems_of(roles={"rollout": {"share": "reference"}})) == {"roles.rollout.share"}
    assert set(problems_of(roles={"reference": {"share": "rollout"}})) == {"roles.reference.share"}


def test_sharding_is_for_hosts_and_fits_what_trains() -> None:
    assert set(problems_of(roles={"rollout": {"sharding": "base"}})) == {"roles.rollout.sharding"}
    split = {"policy": {"workers": 2, "sharding": "base"}, "reference": {"workers": 1}}
    full = {"base": "assets/tiny-moe", "lora": None}
    assert "set it to full" in problems_of(model=full, roles=split)["roles.policy.sharding"]
    assert "roles.policy.sharding" not in problems_of(roles=split)
    alone = {"policy": {"sharding": "full"}, "reference": {"sharding": "base"}}
    problems = problems_of(roles=alone)
    assert set(problems) == {"roles.policy.sharding", "roles.reference.sharding"}
    assert "roles.policy.workers to 2 or more" in problems["roles.policy.sharding"]


def test_what_a_quantised_base_can_not_have_is_refused_by_key() -> None:
    small = {"base": "b", "quantization": "nf4"}
    assert not problems_of(model=small, roles={"policy": {"workers": 2}})
    assert set(problems_of(model=small | {"lora": None})) == {"model.lora"}
    assert set(problems_of(model=small | {"lora": {"expert_impl": "peft"}})) == {"model.lora.expert_impl"}
    eager = small | {"moe": {"experts_implementation": "eager"}}
    assert set(problems_of(model=eager)) == {"model.moe.experts_implementation"}
    assert "read from files" in problems_of(model=small | {"random_init": True})["model.quantization"]
    split = {"policy": {"workers": 2, "sharding": "experts"}, "reference": {"workers": 2, "sharding": "base"}}
    assert set(problems_of(model=small, roles=split)) == {"roles.policy.sharding", "roles.reference.sharding"}
    parallel = {"policy": {"workers": 2, "tensor_parallel_size": 2}}
    assert set(problems_of(model=small, roles=parallel)) == {"roles.policy.tensor_parallel_size"}
    assert "model.quantization" in problems_of(model={"base": "b", "quantization": "fp4"})


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit", "quantization_config"])
def test_bitsandbytes_keys_are_answered_with_ours_and_with_what_that_leaves_out(key: str) -> None:
    (message,) = problems_of(model={"base": "b", key: True}).values()
    assert "write `model.quantization: " in message
    assert "stacked experts too, which bitsandbytes leaves in 16 bits" in message


def test_experts_are_shared_in_groups_that_fit_the_workers() -> None:
    def at_policy(**policy: object) -> dict[str, str]:
        return problems_of(roles={"policy": policy, "reference": {"workers": 1}})

    assert not at_policy(workers=4, sharding="experts+base", expert_parallel_size=2)
    key = "roles.policy.expert_parallel_size"
    assert "multiple of 4" in at_policy(workers=6, sharding="experts", expert_parallel_size=4)[key]
    assert "set that to experts" in at_policy(workers=4, sharding="full", expert_parallel_size=2)[key]
    assert set(problems_of(roles={"rollout": {"expert_parallel_size": 2}})) == {
        "roles.rollout.expert_parallel_size"
    }
    frozen = {"policy": {"workers": 2, "sharding": "experts+base"}, "reference": {"workers": 1}}
    full = {"base": "assets/tiny-moe", "lora": None}
    assert "set it to experts+full" in problems_of(model=full, roles=frozen)["roles.policy.sharding"]
    both = at_policy(workers=4, sharding="experts+full", tensor_parallel_size=2)
    assert "leave out roles.policy.sharding" in both["roles.policy.tensor_parallel_size"]


def test_dropout_on_experts_is_refused() -> None:
    dropout = {"base": "b", "lora": {"lora_dropout": 0.1}}
    assert set(problems_of(model=dropout)) == {"model.lora.lora_dropout"}
    assert not problems_of(model={"base": "b", "lora": {"lora_dropout": 0.1, "targets": ["attention"]}})


def test_stages_start_from_base_or_an_earlier_stage() -> None:
    stages = {
        "first": {"type": "sft", "data": "x", "init": "second"},
        "second": {"type": "dpo", "data": "x", "init": "first", "reference": "secnd"},
        "third": {"type": "dpo", "data": "x", "init": "third", "reference": "base"},
    }
    problems = problems_of(stages)
    assert set(problems) == {"stages.first.init", "stages.second.reference", "stages.third.init"}
    assert "runs after" in problems["stages.first.init"]
    assert "the stage itself" in problems["stages.third.init"]


@pytest.mark.parametrize(
    "name", ["base", "eval", "logs", "start", "1", "experts", "../x", "a b", ".hidden", ""]
)
def test_a_stage_name_is_a_safe_directory_of_its_own(name: str) -> None:
    assert f"stages.{name}" in problems_of({name: {"type": "sft", "data": "x"}})


def test_evaluated_models_exist_once() -> None:
    assert "eval.models" in problems_of(eval={"data": "x", "models": ["base", "dpo"]})
    assert "eval.models" in problems_of(eval={"data": "x", "models": ["sft", "sft"]})
    assert "eval.metric" in problems_of(eval={"data": "x", "metric": "rouge"})
    assert "eval.sampling.n" in problems_of(eval={"data": "x", "sampling": {"n": 4}})
    assert not problems_of(eval={"data": "x", "models": ["base", "sft"], "metric": "pkg.mod:score"})


def test_an_evaluation_converses_with_an_environment_of_the_run() -> None:
    stages = {"sft": {"data": "x"}, "grpo": {"data": "x", "env": "mine:World"}}
    for env_of in ("auto", "grpo"):
        assert not problems_of(stages, eval={"data": "x", "metric": "reward", "env_of": env_of})
    assert "eval.env_of" in problems_of(stages, eval={"data": "x", "env_of": "sft"})
    assert "eval.metric" in problems_of(stages, eval={"data": "x", "metric": "reward", "env_of": None})
    assert "eval.metric" in problems_of(eval={"data": "x", "metric": "reward"})


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": "cdpo", "label_smoothing": 0.6}, "label_smoothing"),
        ({"loss_type": "exo_pair"}, "label_smoothing"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting"),
        ({"loss_type": "apo_zero", "f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 5, "warmup_steps": 10}, "warmup_steps"),
        ({"warmup_steps": 1.5}, "warmup_steps"),
        ({"eval_steps": 5}, "eval_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs.num_cycles"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(keys: dict[str, Any], refused: str) -> None:
    assert dpo(**keys) == {refused}


@pytest.mark.parametrize(
    "keys",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "robust"},
        {"loss_type": "exo_pair", "label_smoothing": 1e-3},
        {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
        {"loss_type": "ipo", "f_divergence_type": "forward_kl"},
        {"max_steps": 10, "warmup_steps": 10},
        {"warmup_steps": 0.1, "max_steps": 5},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ],
)
def test_settings_that_belong_together_are_allowed(keys: dict[str, Any]) -> None:
    assert dpo(**keys) == set()


def test_flash_attention_needs_gpus() -> None:
    flash = {"base": "b", "attn_implementation": "flash_attention_2"}
    assert set(problems_of(model=flash)) == {"model.attn_implementation"}
    assert not problems_of(model=flash, roles={"policy": {"gpus": 1}})


def test_schedule_arguments_are_those_of_the_installed_transformers() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    general = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, arguments in SCHEDULE_ARGUMENTS.items():
        taken = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters) - general
        assert arguments == taken, name

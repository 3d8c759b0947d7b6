"""Runs whose workers of a role may hold a model together."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GraniteMoeConfig, OlmoeConfig, Qwen3MoeConfig, Qwen3NextConfig

from actors.errors import UserError
from actors.models.architectures.tensor_parallel_sizes import split_sizes
from pipeline.config.load import load_config
from pipeline.config.run_config import RunConfig
from pipeline.planning.architecture_rules import architecture_problems
from pipeline.planning.dry_run import shrink

STAGES = {"sft": {"type": "sft", "data": "x"}}
QWEN = Qwen3MoeConfig(
    num_attention_heads=12, num_key_value_heads=4, intermediate_size=96, moe_intermediate_size=48
)


def run_of(roles: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {"name": "r", "model": {"base": "./nowhere", **model}, "stages": STAGES, "roles": roles}


def problems(config: Any, ranks: int, **model: Any) -> list[str]:
    roles = {"policy": {"workers": ranks, "tensor_parallel_size": ranks}}
    run = RunConfig.model_validate(run_of(roles, **model))
    return architecture_problems(run, config.model_type, STAGES, None, split_sizes(config))


def test_ranks_share_heads_and_columns_evenly() -> None:
    assert problems(QWEN, 4) == []
    assert [p.split(";")[0] for p in problems(QWEN, 5)] == [
        "roles.policy.tensor_parallel_size: 5, but 12 (num_attention_heads) can't be shared evenly",
        "roles.policy.tensor_parallel_size: 5, but 4 (num_key_value_heads) can't be shared evenly",
        "roles.policy.tensor_parallel_size: 5, but 96 (intermediate_size) can't be shared evenly",
        "roles.policy.tensor_parallel_size: 5, but 48 (moe_intermediate_size) can't be shared evenly",
    ]


@pytest.mark.parametrize(
    ("config", "model", "reason"),
    [
        (GraniteMoeConfig(), {}, "transformers has no plan that splits the layers of a granitemoe model"),
        (Qwen3NextConfig(), {}, "splitting the layers of a qwen3_next model was not tried"),
        (QWEN, {"lora": {"expert_impl": "peft"}}, "set model.lora.expert_impl: auto"),
        (OlmoeConfig(), {"moe": {"experts_implementation": "eager"}}, "experts_implementation: grouped_mm"),
    ],
)
def test_a_model_is_split_only_where_that_was_tried(config: Any, model: dict[str, Any], reason: str) -> None:
    (problem,) = problems(config, 2, **model)
    assert problem.startswith("roles.policy.tensor_parallel_size: 2, but ")
    assert reason in problem


def test_all_that_is_wrong_with_the_ranks_is_told_at_once(tmp_path: Any) -> None:
    import yaml

    roles = {
        "policy": {"workers": 3, "tensor_parallel_size": 2, "sharding": "full"},
        "rollout": {"tensor_parallel_size": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_of(roles)))
    with pytest.raises(UserError) as error:
        load_config(path)
    text = "\n".join(error.value.problems)
    assert "2 workers hold a model together, but roles.policy.workers is 3" in text
    assert "leave out roles.policy.sharding ('full')" in text
    assert "roles.rollout.engine.tensor_parallel_size" in text


def test_a_dry_run_holds_its_model_together_too() -> None:
    run = RunConfig.model_validate(run_of({"policy": {"workers": 8, "tensor_parallel_size": 4}}))
    policy = shrink(run)[0].roles.policy
    assert (policy.workers, policy.tensor_parallel_size) == (2, 2)

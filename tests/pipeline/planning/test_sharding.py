"""Runs whose workers of a role may share the experts."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.run_config import RunConfig
from pipeline.planning.architecture_rules import architecture_problems


def problems(
    model_type: str,
    workers: int = 2,
    n_experts: int = 8,
    sharding: str = "experts",
    size: int | None = None,
    **model: Any,
) -> list[str]:
    roles = {"policy": {"workers": workers, "sharding": sharding, "expert_parallel_size": size}}
    stages = {"sft": {"type": "sft", "data": "x"}}
    model = {"base": "./nowhere", **model}
    run = {"name": "r", "model": model, "stages": stages, "roles": roles}
    return architecture_problems(RunConfig.model_validate(run), model_type, stages, n_experts)


@pytest.mark.parametrize(
    ("model_type", "model", "reason"),
    [
        ("llama", {}, "a llama model has no experts; set base or full"),
        ("dbrx", {}, "in a loop over all of them; set none"),
        ("unheard_of", {}, "not in the table"),
        ("qwen3_moe", {"moe": {"experts_implementation": "eager"}}, "set that to grouped_mm"),
        ("qwen3_moe", {"lora": {"expert_impl": "peft"}}, "which no worker has; set that to auto"),
    ],
)
def test_experts_are_shared_only_where_that_was_tried(
    model_type: str, model: dict[str, Any], reason: str
) -> None:
    (problem,) = problems(model_type, **model)
    assert problem.startswith("roles.policy.sharding: experts, but ")
    assert reason in problem


def test_layers_are_split_beside_experts_where_both_can_be() -> None:
    assert problems("qwen3_moe", sharding="experts+full") == []
    assert len(problems("dbrx", sharding="experts+full")) == 2, "neither its experts nor its layers"
    (problem,) = problems("llama", sharding="experts+base")
    assert (
        problem == "roles.policy.sharding: experts+base, but a llama model has no experts; set base or full"
    )


def test_workers_share_experts_evenly() -> None:
    assert problems("qwen3_moe", workers=6, n_experts=16, size=2) == []
    assert problems("qwen3_moe", workers=2) == []
    (problem,) = problems("qwen3_moe", workers=3)
    assert problem == "roles.policy.sharding: experts, but 8 experts can't be shared evenly by 3 workers"

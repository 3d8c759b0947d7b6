"""Runs whose workers of a role may share out the positions of rows."""

from __future__ import annotations

from typing import Any

import pytest

from actors.errors import UserError
from pipeline.config.load import load_config
from pipeline.config.run_config import RunConfig
from pipeline.planning.architecture_rules import architecture_problems
from pipeline.planning.costs.passes import largest_pass, work_of
from pipeline.planning.dry_run import shrink
from pipeline.planning.resources import role_plans

STAGES = {"sft": {"type": "sft", "data": "x"}}


def run_of(roles: dict[str, Any], stages: dict[str, Any] = STAGES, **model: Any) -> dict[str, Any]:
    return {"name": "r", "model": {"base": "./nowhere", **model}, "stages": stages, "roles": roles}


def problems(model_type: str, ranks: int, heads: int | None = 12) -> list[str]:
    run = RunConfig.model_validate(run_of({"policy": {"workers": ranks, "sequence_parallel_size": ranks}}))
    return architecture_problems(run, model_type, STAGES, n_heads=heads)


def test_ranks_share_heads_evenly_and_rows_that_are_packed() -> None:
    key = "roles.policy.sequence_parallel_size"
    assert problems("gpt_oss", 4) == []
    assert [p.split(";")[0] for p in problems("qwen3_moe", 5)] == [
        f"{key}: 5, but 12 attention heads can't be shared evenly"
    ]
    for model_type in ("qwen3_next", "unheard_of"):
        (problem,) = problems(model_type, 2)
        assert problem.startswith(f"{key}: 2, but rows of a {model_type} model are padded")


def test_all_that_is_wrong_with_the_ranks_is_told_at_once(tmp_path: Any) -> None:
    import yaml

    roles = {
        "policy": {"workers": 3, "sequence_parallel_size": 2, "tensor_parallel_size": 3},
        "rollout": {"sequence_parallel_size": 2},
    }
    stages = {"sft": {**STAGES["sft"], "packing": False}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_of(roles, stages, attn_implementation="eager")))
    with pytest.raises(UserError) as error:
        load_config(path)
    text = "\n".join(error.value.problems)
    assert "2 workers share out the positions of rows, but roles.policy.workers is 3" in text
    assert "roles.policy.tensor_parallel_size is 3: both share out the heads" in text
    assert "model.attn_implementation is 'eager'" in text
    assert "roles.rollout.sequence_parallel_size" in text
    assert "stages.sft.packing: false, but roles.policy.sequence_parallel_size (2)" in text


def test_the_plan_says_who_shares_a_row_and_a_dry_run_does_it_too() -> None:
    run = RunConfig.model_validate(run_of({"policy": {"workers": 8, "sequence_parallel_size": 4}}))
    assert role_plans(run)["policy"].layout == "pack, 4 share out each row"
    policy = shrink(run)[0].roles.policy
    assert (policy.workers, policy.sequence_parallel_size) == (2, 2)


def test_the_plan_gives_each_rank_its_part_of_a_row() -> None:
    stages = {
        "sft": {**STAGES["sft"], "max_length": 8000, "max_tokens_per_micro_batch": 2000, "batch_size": 4}
    }
    for ranks, tokens in ((1, 8000), (4, 2000)):
        roles = {"policy": {"workers": 4, "sequence_parallel_size": ranks}}
        run = RunConfig.model_validate(run_of(roles, stages))
        stage = run.stages["sft"]
        size = largest_pass(work_of(stage, None), run.roles.policy, stage.max_tokens_per_micro_batch, True)
        assert (size.tokens, size.attended, size.longest) == (tokens, tokens, 8000)
        assert size.counted <= tokens

"""Who can be on which GPU: what can't work is refused before anything starts, with what to write instead."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.load import dump_config, load_mapping, validate

GRPO = {"grpo": {"data": "x", "rewards": "exact_match", "num_generations": 8, "batch_size": 8}}
SFT = {"sft": {"data": "x"}}


def problems_of(stages: dict[str, Any] = GRPO, /, **roles: Any) -> dict[str, str]:
    _, problems = validate({"name": "a", "model": {"base": "b"}, "stages": stages, "roles": roles})
    return {problem.path: problem.message for problem in problems}


def test_trainer_and_engine_on_parts_of_a_gpu_are_refused_with_what_to_write() -> None:
    said = problems_of(policy={"gpus": 0.5}, rollout={"gpus": 0.5})
    assert set(said) == {"roles.rollout.gpus"}
    assert "NCCL" in said["roles.rollout.gpus"]
    assert "`roles: {policy: {gpus: 1}, rollout: {share: policy}}`" in said["roles.rollout.gpus"]
    assert not problems_of(policy={"gpus": 1}, rollout={"share": "policy"})


@pytest.mark.parametrize(("policy", "rollout"), [(1, 0.5), (0.5, 1), (0.6, 0.5), (0.5, 0), (0, 0.5), (1, 1)])
def test_parts_that_never_meet_on_one_gpu_or_exchange_nothing_over_nccl_are_allowed(
    policy: float, rollout: float
) -> None:
    assert not problems_of(policy={"gpus": policy}, rollout={"gpus": rollout})


def test_without_an_online_stage_engines_exchange_nothing_with_the_trainer() -> None:
    assert not problems_of(SFT, policy={"gpus": 0.5}, rollout={"gpus": 0.5})


def test_ranks_of_one_group_on_one_gpu_are_refused() -> None:
    said = problems_of(SFT, policy={"workers": 2, "gpus": 0.5}, reference={"workers": 3, "gpus": 0.25})
    assert set(said) == {"roles.policy.gpus", "roles.reference.gpus"}
    assert "several of the 3 workers on one GPU" in said["roles.reference.gpus"]
    assert not problems_of(SFT, policy={"workers": 2, "gpus": 0.6}, reference={"gpus": 0.25})


def test_one_and_a_half_gpus_are_nothing_that_ray_gives() -> None:
    assert set(problems_of(policy={"gpus": 1.5}, rollout={"gpus": 2.5})) == {
        "roles.policy.gpus",
        "roles.rollout.gpus",
    }


@pytest.mark.parametrize("gpus", [0, 1])
def test_engines_in_turns_are_one_for_each_rank_unless_fewer_are_asked_for(gpus: int) -> None:
    def engines(**rollout: Any) -> int:
        roles = {"policy": {"workers": 3, "gpus": gpus}, "rollout": {"share": "policy", **rollout}}
        config = load_mapping({"name": "a", "model": {"base": "b"}, "stages": GRPO, "roles": roles})
        assert config.roles.gpus_of("rollout") == gpus
        return config.roles.rollout.workers

    assert engines() == 3
    assert engines(workers=2) == 2
    said = problems_of(policy={"workers": 3, "gpus": gpus}, rollout={"share": "policy", "workers": 4})
    assert "4 engines beside 3 ranks" in said["roles.rollout.workers"]


@pytest.mark.parametrize("key", ["cpus", "gpus", "resources", "placement", "sharding"])
def test_engines_in_turns_reserve_nothing_themselves(key: str) -> None:
    value = {"resources": {"big": 1}, "placement": "pack", "sharding": "none"}.get(key, 1)
    said = problems_of(rollout={"share": "policy", key: value})
    assert f"on the devices of policy, so it can't set {key}" in said["roles.rollout"]


@pytest.mark.parametrize("role", ["reference", "critic", "reward", "rollout", "judge"])
def test_engines_take_turns_with_the_policy_alone(role: str) -> None:
    said = problems_of(rollout={"share": role})
    assert "write `share: policy`" in said["roles.rollout.share"]


def test_all_that_can_not_work_in_turns_is_said_at_once() -> None:
    stages = {"grpo": {**GRPO["grpo"], "staleness": 1, "sync": {"in_flight": "keep"}}}
    engine = {"tensor_parallel_size": 2}
    said = problems_of(
        stages, policy={"gpus": 0.5}, rollout={"share": "policy", "workers": 2, "engine": engine}
    )
    assert set(said) == {
        "roles.policy.gpus",
        "roles.rollout.workers",
        "roles.rollout.engine.tensor_parallel_size",
        "stages.grpo.staleness",
    }
    assert "engines sleep then" in said["stages.grpo.staleness"]
    # On CPUs the processes of an engine share the machine.
    assert not problems_of(rollout={"share": "policy", "engine": engine})


def test_an_offload_without_turns_is_refused() -> None:
    said = problems_of(rollout={"offload": "all"})
    assert "add `share: policy`" in said["roles.rollout.offload"]
    assert "roles.rollout.offload" in problems_of(rollout={"share": "policy", "offload": "weights"})


def test_a_config_with_turns_is_the_same_when_it_was_written_and_read() -> None:
    import yaml

    roles = {
        "policy": {"workers": 2, "gpus": 1},
        "rollout": {"share": "policy", "threads": 2, "offload": "optimizer", "engine": {"max_num_seqs": 8}},
    }
    config = load_mapping({"name": "a", "model": {"base": "b"}, "stages": GRPO, "roles": roles})
    assert load_mapping(yaml.safe_load(dump_config(config))) == config

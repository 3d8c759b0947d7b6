"""The table of roles: what the config, the plan and the processes of a run take from it."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.load import validate
from pipeline.config.run_config import RunConfig
from pipeline.planning.resources import describe, working_roles
from pipeline.roles import ROLES, VIEWS, RolesSpec, evaluation_roles, roles_of
from pipeline.stages.specs.registry import STAGE_TYPES

PAIRED: dict[str, Any] = {"data": "x"}
ONLINE: dict[str, Any] = {"data": "x", "rewards": "exact_match", "batch_size": 8}


def config_of(stages: dict[str, Any], **sections: Any) -> RunConfig:
    config, problems = validate({"name": "r", "model": {"base": "b"}, "stages": stages, **sections})
    assert config is not None, problems
    return config


def test_every_role_has_its_key_with_its_purpose_in_the_order_of_the_table() -> None:
    assert list(RolesSpec.model_fields) == list(ROLES)
    described = {name: field.description for name, field in RolesSpec.model_fields.items()}
    assert described == {name: role.purpose for name, role in ROLES.items()}


def test_views_share_by_default_and_all_other_roles_have_processes_of_their_own() -> None:
    roles = RolesSpec()
    assert VIEWS == ("reference", "critic", "reward")
    assert {role: roles.server_of(role) for role in ROLES} == {
        "policy": "policy",
        "reference": "policy",
        "critic": "policy",
        "reward": "policy",
        "rollout": "rollout",
        "judge": "judge",
    }
    assert roles.with_processes(set(ROLES) - {"judge"}) == ["policy", "rollout"]
    assert roles.engine_of("rollout") == roles.rollout.engine


def test_engines_in_turns_have_processes_beside_those_whose_devices_they_have() -> None:
    roles = RolesSpec(policy={"workers": 2, "gpus": 1}, rollout={"share": "policy", "threads": 2})
    assert roles.server_of("rollout") == "rollout"
    assert roles.host_of("rollout") == "policy"
    assert roles.alternates("rollout")
    assert not roles.alternates("critic")
    assert roles.gpus_of("rollout") == roles.gpus_of("reference") == 1
    assert roles.with_processes(["rollout"]) == ["policy", "rollout"]


@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        ("sft", {"policy"}),
        ("reward", {"policy"}),
        ("dpo", {"policy", "reference"}),
        ("kto", {"policy", "reference"}),
        ("ppo", {"policy", "reference", "critic", "rollout"}),
        ("grpo", {"policy", "reference", "rollout"}),
        ("rloo", {"policy", "reference", "rollout"}),
        ("reinforce_pp", {"policy", "reference", "rollout"}),
        ("online_dpo", {"policy", "reference", "rollout"}),
        ("distill", {"policy", "reference", "rollout"}),
    ],
)
def test_a_stage_needs_the_roles_of_its_kind(kind: str, needs: set[str]) -> None:
    online = STAGE_TYPES[kind].online
    more = {"teacher": "base", "init": "first"} if kind == "distill" else {}
    first = {"first": PAIRED | {"type": "sft"}}
    stage = config_of(first | {kind: (ONLINE if online else PAIRED) | more}).stages[kind]
    assert roles_of(stage) == needs
    if online:
        asks = config_of(
            first | {kind: {**ONLINE, **more, "rewards": ["exact_match", "runs/a/reward/adapter"]}}
        )
        assert roles_of(asks.stages[kind]) == needs | {"reward"}
        judge = {"kind": "judge", "model": "b", "prompt": "judge.txt"}
        judged = config_of(first | {kind: {**ONLINE, **more, "rewards": [judge]}})
        assert roles_of(judged.stages[kind]) == needs | {"judge"}
        elsewhere = config_of(
            first | {kind: {**ONLINE, **more, "rewards": [judge | {"endpoint": "http://a/v1"}]}}
        )
        assert roles_of(elsewhere.stages[kind]) == needs


def test_evaluation_needs_engines_and_the_plan_lists_the_roles_that_work() -> None:
    assert evaluation_roles() == {"rollout"}
    assert working_roles(config_of({"sft": PAIRED})) == ["policy"]
    evaluated = config_of({"sft": PAIRED}, eval={"data": "y"})
    assert working_roles(evaluated) == ["policy", "rollout"]
    rows = describe(config_of({"ppo": ONLINE}))
    assert [row[0] for row in rows] == ["policy", "reference", "critic", "rollout", "together"]
    assert rows[2][1:3] == ["on policy's processes", "0"]

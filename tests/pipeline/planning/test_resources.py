"""Resources of a run, and the dry run's rule for online stages: pure, from configs alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.cluster import RaySpec, local_resources
from actors.errors import UserError
from actors.models.base.loading import resolve_base
from actors.models.facts import base_sizes
from actors.models.spec import LoraSpec, ModelSpec
from pipeline import api
from pipeline.config.load import validate
from pipeline.config.run_config import RunConfig
from pipeline.planning.costs.payloads import payload_bytes
from pipeline.planning.dry_run import DryRun, reward_twins, shrink
from pipeline.planning.resources import cluster_plan, describe, machine_problems, working_roles


def config(stages: dict[str, Any], **sections: Any) -> RunConfig:
    data = {"name": "a", "model": {"base": "some/base"}, "stages": stages, **sections}
    loaded, problems = validate(data)
    assert loaded is not None, problems
    return loaded


def online(kind: str = "grpo", **keys: Any) -> dict[str, Any]:
    return {kind: {"data": "x", "rewards": "exact_match", **keys}}


@pytest.mark.parametrize(
    ("keys", "size", "group", "batches"),
    [
        ({}, 8, 4, 1),
        ({"num_generations": 16, "batch_size": 512}, 8, 4, 1),
        ({"num_generations": 3, "batch_size": 9}, 8, 2, 1),
        ({"num_generations": 8, "steps_per_generation": 4}, 4, 4, 2),
        ({"num_generations": 6, "batch_size": 3, "steps_per_generation": 4}, 4, 4, 2),
        ({"num_generations": 2, "batch_size": 2}, 2, 2, 1),
    ],
)
def test_a_dry_step_has_few_samples_in_whole_groups(
    keys: dict[str, Any], size: int, group: int, batches: int
) -> None:
    stage = shrink(config(online(**keys)))[0].stages["grpo"]
    assert (stage.batch_size, stage.num_generations, stage.steps_per_generation) == (size, group, batches)
    assert stage.samples_per_step <= 8


def test_a_dry_run_of_ppo_is_two_short_steps_with_a_checkpoint_between() -> None:
    ppo = online("ppo", critic_warmup_steps=20, max_steps=500, max_completion_length=512)
    small, changes = shrink(config(ppo, model={"base": "b", "dtype": "bfloat16"}))
    stage = small.stages["ppo"]
    assert (stage.max_steps, stage.save_steps, stage.critic_warmup_steps) == (2, 1, 1)
    assert (stage.max_completion_length, stage.num_iterations) == (16, 4)
    assert ["stages.ppo.max_completion_length", "512", "16"] in changes


def test_a_dry_run_takes_engines_off_the_gpus() -> None:
    engine = {"tensor_parallel_size": 2, "max_model_len": 2048}
    small, changes = shrink(config(online(), roles={"rollout": {"workers": 4, "gpus": 2, "engine": engine}}))
    rollout = small.roles.rollout
    assert (rollout.workers, rollout.gpus, rollout.engine.tensor_parallel_size) == (2, 0, 1)
    assert rollout.engine.max_model_len == 2048
    assert ["roles.rollout.engine.tensor_parallel_size", "2", "1"] in changes
    assert ["stages.grpo.data[0].max_rows", "null", "64"] in changes


def test_a_dry_run_keeps_the_turns_of_policy_and_engines() -> None:
    roles = {
        "policy": {"workers": 4, "gpus": 1},
        "rollout": {"share": "policy", "engine": {"max_model_len": 2048}},
    }
    small, _ = shrink(config(online(), roles=roles))
    policy, rollout = small.roles.policy, small.roles.rollout
    assert (policy.workers, policy.gpus) == (2, 0)
    assert (rollout.share, rollout.workers, rollout.engine.max_model_len) == ("policy", 2, 2048)


def test_engines_that_take_turns_are_processes_and_ask_for_nothing() -> None:
    roles = {"policy": {"workers": 2, "cpus": 1, "gpus": 1}, "rollout": {"share": "policy"}}
    rows = describe(config(online(), roles=roles))
    assert rows[2:] == [
        ["rollout", "in turns on policy's devices", "2", ""],
        ["together", "", "4", "2 CPU, 2 GPU"],
    ]


def test_a_reward_models_directory_becomes_a_twin_in_the_dry_run() -> None:
    rewards = ["exact_match", {"source": "runs/other/reward/adapter", "weight": 2}]
    wanted = config(online(rewards=rewards))
    small, _ = shrink(wanted)
    sources = [reward.source for reward in small.stages["grpo"].rewards]
    twin = str(Path(small.output_dir).absolute() / "twin-reward-0")
    assert sources == ["exact_match", twin]
    assert reward_twins(wanted, Path(small.output_dir)) == {"runs/other/reward/adapter": twin}


def test_only_roles_that_some_stage_uses_work() -> None:
    reward = {"reward": {"data": "x"}}
    assert working_roles(config({"sft": {"data": "x"}})) == ["policy"]
    assert working_roles(config({"sft": {"data": "x"}}, eval={"data": "y"})) == ["policy", "rollout"]
    assert working_roles(config(online())) == ["policy", "reference", "rollout"]
    ppo = config({**reward, **online("ppo", rewards="reward")})
    assert working_roles(ppo) == ["policy", "reference", "critic", "reward", "rollout"]


def test_what_the_roles_ask_for_is_summed_and_views_ask_for_nothing() -> None:
    roles = {"policy": {"workers": 2, "cpus": 1, "gpus": 1}, "rollout": {"workers": 4, "gpus": 0.5}}
    rows = describe(config(online("ppo"), roles=roles))
    assert rows == [
        ["policy", "pack", "2", "2 CPU, 2 GPU"],
        ["reference", "on policy's processes", "0", ""],
        ["critic", "on policy's processes", "0", ""],
        ["rollout", "pack", "4", "1 CPU, 2 GPU"],
        ["together", "", "6", "3 CPU, 4 GPU"],
    ]


def test_the_plan_says_what_an_online_step_does() -> None:
    text = cluster_plan(config({"reward": {"data": "x"}, **online(rewards=["reward", "m:f"], max_steps=7)}))
    assert "grpo (grpo) from base: 7 steps, a step samples 4 prompts x 8, up to 256 new tokens" in text
    assert "scores them by reward, m:f, takes 1 optimizer step of 32 samples, syncs the engines" in text


def test_the_plan_says_what_is_drawn_again_and_ahead_and_what_ranks_share() -> None:
    roles = {"policy": {"workers": 2, "sharding": "base"}}
    text = cluster_plan(config(online(max_resampling_rounds=2, staleness=1), roles=roles))
    assert "4 prompts x 8 (up to 2 further rounds for prompts of equal rewards), up to" in text
    assert "syncs the engines; samples are generated up to 1 step ahead" in text
    assert "policy: 2 x process, 0.5 CPU (pack, sharding base)" in text


def test_a_sync_of_adapters_sends_a_and_b_and_a_merged_one_the_weights(tiny_base: Path) -> None:
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(tiny_base)
    sizes = base_sizes(base)
    model = ModelSpec(base="b", dtype="bfloat16", lora=LoraSpec(r=4, targets=["attention"]))
    heads, hidden, layers = base.num_attention_heads * base.head_dim, base.hidden_size, base.num_hidden_layers
    keys = base.num_key_value_heads * base.head_dim
    weights = layers * 2 * hidden * (heads + keys)
    factors = layers * 4 * (2 * (hidden + heads) + 2 * (hidden + keys))
    assert payload_bytes("adapter", sizes, model) == factors * 4
    assert payload_bytes("merged", sizes, model) == weights * 2
    assert payload_bytes("lora", sizes, model) == factors * 2


def test_what_is_asked_for_is_held_against_this_machine_unless_a_cluster_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    there = local_resources()
    roles = {
        "policy": {"workers": 2, "cpus": there["CPU"]},
        "rollout": {"gpus": there["GPU"] + 4, "engine": {"tensor_parallel_size": int(there["GPU"]) + 4}},
        "reward": {"workers": 1, "cpus": 1e6},
    }
    wide = config(online(), roles=roles)
    said = machine_problems(wide)
    cpus, gpus = said
    assert f"roles.policy.workers 2 x cpus {there['CPU']:g}" in cpus
    assert f"this machine has {there['CPU']:g}" in cpus
    assert "roles.reward" not in cpus, "no stage asks a reward model"
    assert f"roles.rollout.workers 1 x gpus {there['GPU'] + 4:g}" in gpus
    (left,) = machine_problems(wide, ["policy"])
    assert "CPU" in left
    assert not machine_problems(wide.model_copy(update={"ray": RaySpec(address="auto")}))
    (left,) = machine_problems(wide.model_copy(update={"ray": RaySpec(num_cpus=1e3)}))
    assert "GPU" in left
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not machine_problems(wide)
    assert not machine_problems(shrink(wide)[0])


def test_validate_and_run_say_what_this_machine_lacks_beside_what_is_wrong_with_data(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    wide = config(
        {"sft": {"data": str(tmp_path / "nowhere.jsonl")}},
        model={"base": str(tiny_base)},
        output_dir=str(tmp_path / "out"),
        roles={"policy": {"cpus": 1e6}},
    )
    with pytest.raises(UserError) as refused:
        api.run(wide)
    for problems in (api.validate(wide).problems, refused.value.problems):
        said = "\n".join(problems)
        assert "roles.policy.workers 1 x cpus 1e+06" in said
        assert "nowhere.jsonl" in said


def test_a_dry_run_needs_config_and_tokenizer_of_a_base_and_no_weights(
    tmp_path: Path, tiny_base: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    wanted = config(
        {"sft": {"data": "builtin:arithmetic"}}, model={"base": str(bare)}, output_dir=str(tmp_path / "out")
    )
    assert any("has no weights" in problem for problem in api.validate(wanted).problems)
    dry = DryRun.of(wanted)
    assert dry.wanted.model.random_init is False
    dry.write_twins()
    assert not resolve_base(dry.config.model).problems
    assert not [change for change in dry.changes if change[0].startswith("ray.")]
    (bare / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds neither config\.json nor adapter_config\.json"):
        DryRun.of(wanted)

"""Online stages in the configuration: defaults, roles, rewards, and what is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.load import validate
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_reader import apply_overrides
from pipeline.stages.specs.registry import STAGE_TYPES

BASE: dict[str, Any] = {"name": "a", "model": {"base": "b"}}
WHOLE: dict[str, Any] = {
    "sft": {"data": "x"},
    "reward": {"data": "x"},
    "dpo": {"data": "x"},
    "ppo": {"data": "x", "rewards": "reward"},
}


def run(stages: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    config, problems = validate({**BASE, "stages": stages or WHOLE, **sections})
    assert config is not None, problems
    return config


def problems_of(stages: dict[str, Any] | None = None, **sections: Any) -> dict[str, str]:
    config, problems = validate({**BASE, "stages": stages or WHOLE, **sections})
    assert (config is None) == bool(problems)
    return {p.path: p.message for p in problems}


def of(kind: str, **keys: Any) -> dict[str, str]:
    found = problems_of({kind: {"data": "x", "rewards": "exact_match", **keys}})
    return {path.removeprefix(f"stages.{kind}."): message for path, message in found.items()}


def test_the_whole_graph_passes_the_policy_on_and_the_reward_model_by() -> None:
    config = run()
    assert [config.init_of(name) for name in WHOLE] == ["base", "sft", "sft", "dpo"]
    assert (config.reference_of("dpo"), config.reference_of("ppo")) == ("sft", "dpo")
    assert config.reward_models_of("ppo") == {"reward": "reward"}
    assert config.critic_init_of("ppo") == "dpo"
    assert run(eval={"data": "x"}).eval_models() == ["base", "sft", "dpo", "ppo"]
    assert {
        role: getattr(config.roles, role).share for role in ("reference", "critic", "reward", "rollout")
    } == {
        "reference": "policy",
        "critic": "policy",
        "reward": "policy",
        "rollout": None,
    }


def test_defaults_of_each_algorithm() -> None:
    stages = {kind: {"data": "x", "rewards": "exact_match"} for kind in ("ppo", "grpo", "rloo")}
    ppo, grpo, rloo = run(stages).stages.values()
    assert [(s.num_generations, s.num_iterations) for s in (ppo, grpo, rloo)] == [(1, 4), (8, 1), (2, 1)]
    assert [(s.beta, s.kl_in, s.kl_estimator) for s in (ppo, grpo, rloo)] == [
        (0.05, "reward", "k1"),
        (0.0, "loss", "k3"),
        (0.05, "reward", "k1"),
    ]
    assert [s.importance_sampling_level for s in (ppo, grpo, rloo)] == ["token", "token", "trajectory"]
    assert (ppo.samples_per_step, ppo.prompts_per_step, ppo.updates_per_step) == (32, 32, 4)
    assert (grpo.samples_per_step, grpo.prompts_per_step, grpo.updates_per_step) == (32, 4, 1)


def test_defaults_are_those_of_the_installed_trl() -> None:
    trl = pytest.importorskip("trl")
    from pipeline.stages.specs.registry import GrpoStage, RlooStage

    of_both = {"beta", "epsilon", "epsilon_high", "num_iterations", "num_generations", "temperature"}
    of_grpo = of_both | {"delta", "loss_type", "scale_rewards", "entropy_coef", "importance_sampling_level"}
    of_grpo |= {"use_bias_correction_kl", "mask_truncated_completions"}
    for spec, theirs, names in ((GrpoStage, trl.GRPOConfig, of_grpo), (RlooStage, trl.RLOOConfig, of_both)):
        for name in names:
            assert spec.model_fields[name].get_default() == theirs.__dataclass_fields__[name].default, name


def test_the_losses_and_advantages_take_their_options_from_the_stage_under_the_same_names() -> None:
    from actors.algorithms.advantages import ADVANTAGES, AdvantageSpec
    from actors.algorithms.policy import PolicyLoss
    from actors.algorithms.value import ValueLoss
    from pipeline.stages.specs.registry import PolicyGradientStage, PpoStage

    stages = [stage for stage in STAGE_TYPES.values() if issubclass(stage, PolicyGradientStage)]
    found_by_the_loop = {"on_policy", "mismatch_limits", "ratio_tolerance"}
    of_all_stages = set.intersection(*(set(s.model_fields) for s in stages))
    assert set(PolicyLoss.model_fields) - found_by_the_loop <= of_all_stages
    assert set(ValueLoss.model_fields) <= set(PpoStage.model_fields)
    assert {s.advantage for s in stages} == set(ADVANTAGES)
    assert set(AdvantageSpec.model_fields) - {"kind"} <= set().union(*(s.model_fields for s in stages))


@pytest.mark.parametrize(
    ("rewards", "sources"),
    [
        ("exact_match", [("exact_match", 1.0)]),
        ({"source": "pkg.mod:score", "weight": 2}, [("pkg.mod:score", 2.0)]),
        (
            ["exact_match", {"source": "runs/a/reward/adapter"}],
            [("exact_match", 1.0), ("runs/a/reward/adapter", 1.0)],
        ),
    ],
)
def test_rewards_are_a_source_a_mapping_or_a_list(rewards: Any, sources: list[tuple[str, float]]) -> None:
    stage = run({"grpo": {"data": "x", "rewards": rewards}}).stages["grpo"]
    assert [(reward.source, reward.weight) for reward in stage.rewards] == sources


def test_a_reward_in_short_can_be_set_in_full_by_an_override() -> None:
    data = {**BASE, "stages": {"grpo": {"data": "x", "rewards": ["exact_match", "m:f"]}}}
    data, problems = apply_overrides(data, ["stages.grpo.rewards.1.weight=0.5"])
    config, _ = validate(data)
    assert not problems
    assert config is not None
    assert [reward.weight for reward in config.stages["grpo"].rewards] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("rewards", "at", "says"),
    [
        ("rewrd", "rewards.0", "no stage is named 'rewrd'; possible: reward"),
        ("sft", "rewards.0", "a stage of type sft"),
        ("late", "rewards.0", "runs after"),
        (["reward", "reward"], "rewards.1", "twice"),
        ([{"source": "reward", "weight": 0}], "rewards", "nothing is wanted"),
        ([], "rewards", "is empty"),
        ("my_rewards.brevity", "rewards.0", "did you mean `my_rewards:brevity`?"),
        ("exactmatch", "rewards.0", "did you mean `exact_match`?"),
    ],
)
def test_a_reward_that_nothing_can_give_is_refused(rewards: Any, at: str, says: str) -> None:
    stages = {
        "sft": {"data": "x"},
        "reward": {"data": "x"},
        "grpo": {"data": "x", "rewards": rewards},
        "late": {"type": "reward", "data": "x"},
    }
    found = problems_of(stages)
    assert set(found) == {f"stages.grpo.{at}"}
    assert says in found[f"stages.grpo.{at}"]


@pytest.mark.parametrize(
    ("kind", "keys", "refused"),
    [
        ("grpo", {"num_generations": 5}, "num_generations"),
        ("grpo", {"num_generations": 1}, "num_generations"),
        ("rloo", {"num_generations": 1}, "num_generations"),
        ("ppo", {"max_completion_length": 1024}, "max_completion_length"),
        (
            "grpo",
            {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False},
            "kl_estimator",
        ),
        ("grpo", {"kl_target": 6.0}, "kl_target"),
        ("grpo", {"delta": 1.1}, "delta"),
        ("grpo", {"epsilon_high": 3.0, "delta": 3.5}, "delta"),
        ("grpo", {"epsilon": 1.0}, "epsilon"),
        ("grpo", {"temperature": 0.0}, "temperature"),
        ("online_dpo", {"temperature": 0.009}, "temperature"),
        ("ppo", {"temperature": 2.1}, "temperature"),
        ("grpo", {"stop": ["a", ""]}, "stop.1"),
        ("ppo", {"critic_warmup_steps": 5, "max_steps": 5}, "critic_warmup_steps"),
        ("ppo", {"critic_init": "sft"}, "critic_init"),
        ("grpo", {"critic_init": "sft"}, "critic_init"),
        ("ppo", {"max_steps": 2, "warmup_steps": 9}, "warmup_steps"),
        ("ppo", {"eval_data": "y"}, "eval_data"),
        ("ppo", {"truncation_mode": "keep_end"}, "truncation_mode"),
        ("ppo", {"lam": 1.5}, "lam"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: str, keys: dict[str, Any], refused: str) -> None:
    assert set(of(kind, **keys)) == {refused}


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("ppo", {"max_steps": 2, "warmup_steps": 8}),
        ("ppo", {"kl_target": 6.0, "kl_in": "loss", "kl_estimator": "k2"}),
        ("ppo", {"critic_warmup_steps": 4, "max_steps": 5}),
        ("grpo", {"beta": 0.1, "kl_estimator": "k1"}),
        ("ppo", {"use_bias_correction_kl": False}),
        ("grpo", {"beta": 0.0, "kl_estimator": "k1", "use_bias_correction_kl": False}),
        ("grpo", {"delta": 1.5}),
        ("grpo", {"num_generations": 4, "batch_size": 2, "steps_per_generation": 2}),
        ("rloo", {"importance_sampling_level": "token", "loss_type": "dr_grpo"}),
        ("ppo", {"max_length": None, "max_completion_length": 4000}),
    ],
)
def test_settings_that_go_together_are_allowed(kind: str, keys: dict[str, Any]) -> None:
    assert of(kind, **keys) == {}


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p", "repetition_penalty"])
def test_filters_that_the_trainer_does_not_see_are_refused_with_the_reason(key: str) -> None:
    assert "old log-probabilities would not be those" in of("grpo", **{key: 0.9})[key]


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("num_ppo_epochs", "num_iterations: 3"),
        ("kl_coef", "beta: 3"),
        ("response_length", "max_completion_length: 3"),
        ("num_mini_batches", "steps_per_generation: 3"),
        ("cliprange", "epsilon: 3"),
        ("gae_lambda", "lam: 3"),
        ("vllm_tensor_parallel_size", "roles.rollout.engine.tensor_parallel_size: 3"),
        ("reward_funcs", "rewards"),
    ],
)
def test_other_trainers_names_are_answered_with_ours(key: str, ours: str) -> None:
    assert ours in of("ppo", **{key: 3})[key]


def test_every_answer_names_keys_that_exist() -> None:
    import re

    from pipeline.config.fields import all_paths
    from pipeline.config.trl_keys import INSTEAD

    known = {path.rsplit(".", 1)[-1] for path in all_paths(RunConfig)} | {"source"}
    named = {key for text in INSTEAD.values() for key in re.findall(r"write `([\w.]+)", text)}
    assert not {key for key in named if key.rsplit(".", 1)[-1] not in known}


def test_views_share_the_policy_only() -> None:
    assert set(problems_of(roles={"critic": {"share": "reward"}})) == {"roles.critic.share"}
    assert set(problems_of(roles={"rollout": {"share": "critic"}})) == {"roles.rollout.share"}
    assert not problems_of(roles={"critic": {"workers": 2}, "reward": {"workers": 1}})


def test_an_engine_over_several_gpus_asks_for_as_many() -> None:
    spread = {"engine": {"tensor_parallel_size": 2}}
    short = problems_of(roles={"rollout": {**spread, "gpus": 1}})
    assert set(short) == {"roles.rollout.engine.tensor_parallel_size"}
    assert not problems_of(roles={"rollout": {**spread, "gpus": 2}})
    # On CPUs its processes share the cores.
    assert not problems_of(roles={"rollout": spread})


def test_gpus_that_nobody_would_use_are_refused() -> None:
    assert set(problems_of(roles={"rollout": {"gpus": 2}})) == {"roles.rollout.gpus"}
    assert set(problems_of(roles={"policy": {"gpus": 4}})) == {"roles.policy.gpus"}
    assert not problems_of(roles={"policy": {"workers": 4, "gpus": 1}, "rollout": {"gpus": 1}})


def test_what_a_sample_may_take_fits_into_an_engine() -> None:
    short = {"rollout": {"engine": {"max_model_len": 512}}}
    assert set(of("grpo", max_length=4097)) == {"max_length"}
    assert of("grpo", max_length=4096) == {}
    stages = {"grpo": {"data": "x", "rewards": "exact_match"}}
    assert set(problems_of(stages, roles=short)) == {"stages.grpo.max_length"}
    long = {"rollout": {"engine": {"max_model_len": 8192}}}
    stages["grpo"] |= {"max_length": None, "max_completion_length": 8000}
    assert not problems_of(stages, roles=long)
    assert set(problems_of(stages)) == {"stages.grpo.max_completion_length"}


def test_stages_of_adapters_need_lora() -> None:
    found = problems_of(
        {"reward": {"data": "x"}, "grpo": {"data": "x", "rewards": "reward"}},
        model={"base": "b", "lora": None},
    )
    assert set(found) == {"stages.reward.type", "stages.grpo.type"}


def test_a_reward_model_is_no_start_no_reference_and_answers_no_prompts() -> None:
    stages = {"reward": {"data": "x"}, "dpo": {"data": "x", "init": "reward", "reference": "reward"}}
    assert set(problems_of(stages)) == {"stages.dpo.init", "stages.dpo.reference"}
    assert "reward model" in problems_of(eval={"data": "x", "models": ["reward"]})["eval.models"]


def test_a_missing_reward_is_one_problem() -> None:
    assert set(problems_of({"ppo": {"data": "x"}})) == {"stages.ppo.rewards"}


def test_a_stage_that_cannot_be_read_does_not_make_others_that_name_it_wrong() -> None:
    stages = {"reward": {"data": "x", "beta": 1, "type": "rewrd"}, "ppo": {"data": "x", "rewards": "reward"}}
    assert set(problems_of(stages)) == {"stages.reward"}


def test_stages_whose_adapters_would_share_a_name_are_refused() -> None:
    sft = {"type": "sft", "data": "x"}
    assert "stage 'a.b'" in problems_of({"a.b": sft, "a_b": sft})["stages.a_b"]


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"loss_type": "cispo"}, "epsilon_high"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high"),
        ({"loss_type": "cispo", "epsilon_high": 5, "delta": 6}, "delta"),
        ({"soft_punish_cache": 300}, "soft_punish_cache"),
    ],
)
def test_cispo_and_the_overlong_penalty_say_what_they_lack(keys: dict[str, Any], path: str) -> None:
    assert set(problems_of({"grpo": {"data": "x", "rewards": "exact_match", **keys}})) == {
        f"stages.grpo.{path}"
    }


def test_reinforce_pp_needs_several_samples_of_a_prompt_only_for_their_baseline() -> None:
    stage = {"data": "x", "rewards": "exact_match", "num_generations": 1}
    assert run({"reinforce_pp": stage}).stages["reinforce_pp"].advantage == "reinforce"
    assert problems_of({"reinforce_pp": {**stage, "baseline": "group"}}) == {
        "stages.reinforce_pp.num_generations": "1: reinforce_pp compares a prompt's samples; at least 2"
    }


def test_equal_rewards_are_drawn_again_only_where_samples_are_compared() -> None:
    assert of("grpo", max_resampling_rounds=2) == {}
    assert set(of("ppo", max_resampling_rounds=2)) == {"max_resampling_rounds"}


def test_online_dpo_has_the_keys_of_dpo_and_none_of_a_policy_gradient() -> None:
    assert of("online_dpo", loss_type=["sigmoid", "sft"], loss_weights=[1, 0.1], beta=0.2) == {}
    assert set(of("online_dpo", loss_type="exo_pair", num_generations=1, epsilon=0.1)) == {
        "epsilon",
        "label_smoothing",
        "num_generations",
    }
    assert set(of("online_dpo", loss_type="exo_pair", num_generations=1)) == {
        "label_smoothing",
        "num_generations",
    }


@pytest.mark.parametrize("kind", STAGE_TYPES)
def test_a_stage_changes_defaults_of_its_losses_settings_and_neither_types_nor_bounds(kind: str) -> None:
    """A setting of a loss or an advantage has one declaration; a stage may only start from another value."""
    stage = STAGE_TYPES[kind]
    declared = {
        name: field
        for settings in stage.__mro__
        if settings.__module__.startswith("actors.algorithms")
        for name, field in settings.model_fields.items()
    }
    assert declared or kind == "sft"
    for name, field in declared.items():
        own = stage.model_fields[name]
        assert own.annotation == field.annotation, name
        assert str(own.metadata) == str(field.metadata), name


def test_rewards_that_are_all_only_watched_are_refused() -> None:
    watched = {"source": "exact_match", "weight": 0}
    assert "every weight is 0" in of("grpo", rewards=[watched])["rewards"]
    assert not of("grpo", rewards=[watched, "reward:f"])


def test_the_engines_of_a_run_judge_with_one_model() -> None:
    judges = [{"kind": "judge", "model": model, "prompt": "judge.txt"} for model in ("a", "a", "b")]
    assert not of("grpo", rewards=judges[:2])
    assert "hold one model" in of("grpo", rewards=judges)["rewards"]
    assert not of("grpo", rewards=[*judges[:2], judges[2] | {"endpoint": "http://a/v1"}])
    asked = judges[0] | {"extra_body": {"chat_template_kwargs": {}, "top_k": 1}}
    assert "top_k: without an endpoint" in of("grpo", rewards=[asked])["rewards.0"]
    assert set(of("grpo", rewards=[{"source": "exact_match", "on_error": float("inf")}])) == {"rewards.0"}


def test_a_temperature_that_vllm_would_change_is_refused_with_what_to_write() -> None:
    said = of("grpo", temperature=0.005)["temperature"]
    assert said == "0.005: vLLM would draw at 0.01; write 0.01 to 2"
    found = problems_of(eval={"data": "x", "sampling": {"temperature": 0.005}})
    assert found == {"eval.sampling.temperature": f"{said}, or 0 for the most probable token"}
    assert run(eval={"data": "x", "sampling": {"temperature": 0.0}}).eval is not None


def test_a_teacher_is_another_policy_and_its_divergence_is_the_reward_of_each_token() -> None:
    stages = {"sft": {"data": "x"}, "dpo": {"data": "x"}}
    student = {"type": "distill", "data": "x", "init": "sft", "batch_size": 8}
    config = run({**stages, "a": {**student, "teacher": "dpo"}})
    stage = config.stages["a"]
    assert (config.reference_of("a"), stage.beta, stage.gamma, stage.kl_estimator) == ("dpo", 1, 0, "k1")
    assert problems_of({**stages, "a": {**student, "teacher": "sft"}})["stages.a.teacher"].startswith(
        "'sft' is what the stage starts from"
    )
    assert (
        "no stage is named 'x'"
        in problems_of({**stages, "a": {**student, "teacher": "x"}})["stages.a.teacher"]
    )
    top = {**student, "teacher": "dpo", "teacher_top_k": 8, "beta": 0.5}
    assert not problems_of({**stages, "a": top})
    wrong = {"beta": 2.0, "rewards": "exact_match", "gamma": 1.0, "epsilon": 0.1, "kl_in": "loss"}
    assert set(problems_of({**stages, "a": top | wrong})) == {f"stages.a.{key}" for key in wrong}
    wrong = {"beta": 0, "kl_in": "loss", "kl_estimator": "k3"}
    assert set(problems_of({**stages, "a": {**student, "teacher": "dpo", **wrong}})) == {
        f"stages.a.{key}" for key in wrong
    }


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"tool_parser": "hermes"}, "tool_parser"),
        ({"max_tool_calling_iterations": 2}, "max_tool_calling_iterations"),
        ({"tools": ["worlds:add"]}, "tool_parser"),
        ({"env": "worlds:Guess", "soft_punish_cache": 8}, "soft_punish_cache"),
        ({"env": "worlds.Guess"}, "env"),
        ({"env": "verifiers"}, "env"),
        ({"env": "worlds:Guess", "agent": "worlds:ask"}, "agent"),
        ({"env": "worlds:Guess", "env_on_error": float("inf")}, "env_on_error"),
    ],
)
def test_conversations_say_what_they_lack(keys: dict[str, Any], path: str) -> None:
    assert list(of("grpo", **keys)) == [path]


def test_an_environment_may_be_all_the_reward_there_is_and_tools_are_not() -> None:
    assert problems_of({"grpo": {"data": "x", "env": "worlds:Guess"}}) == {}
    assert problems_of({"grpo": {"data": "x", "agent": "worlds:ask"}}) == {}
    assert of("grpo", env="worlds:Guess", tool_parser="hermes", max_tool_calling_iterations=3) == {}
    alone = run({"grpo": {"data": "x", "env": "worlds:Guess"}}).stages["grpo"]
    assert type(alone).model_validate(alone.model_dump(mode="json")) == alone
    tools = {"data": "x", "tools": ["worlds:add"], "tool_parser": "hermes"}
    assert list(problems_of({"grpo": tools})) == ["stages.grpo.rewards"]
    assert list(problems_of({"grpo": {"data": "x"}})) == ["stages.grpo.rewards"]

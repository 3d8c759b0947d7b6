"""Rules between the fields of one online stage. Pure: a stage in, every violation out, by its keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pipeline.config.problem import Problem
from pipeline.stages.specs.registry import OnlineStage, PolicyGradientStage


def online_problems(stage: OnlineStage) -> Iterator[Problem]:
    """Every rule of online stages that `stage` breaks."""
    offline = {"eval_data": None, "eval_steps": None, "truncation_mode": "keep_start"}
    for key, unset in offline.items():
        if getattr(stage, key) != unset:
            yield Problem(
                key,
                "is for stages with answers in their data; an online stage writes its own: a prompt that is "
                "too long follows its source's on_bad_row, and `eval` scores held-out prompts",
            )
    yield from _sampling_problems(stage)
    yield from _turn_problems(stage)
    yield from staleness_problems(stage)
    if stage.learns_from == "advantages":
        yield from _kl_problems(stage)
    if stage.critic is not None and stage.critic.critic_warmup_steps >= stage.max_steps > 0:
        yield Problem(
            "critic_warmup_steps",
            f"{stage.critic.critic_warmup_steps} leaves the policy no step to learn in (max_steps: "
            f"{stage.max_steps})",
        )


def _sampling_problems(stage: OnlineStage) -> Iterator[Problem]:
    samples, group = stage.samples_per_step, stage.num_generations
    if len(stage.judge_models) > 1:
        yield Problem(
            "rewards",
            f"{' and '.join(stage.judge_models)}: the engines of roles.judge hold one model; ask the others "
            "at an `endpoint`",
        )
    if not stage.rewards and not stage.converses and stage.needs_rewards:
        yield Problem("rewards", "is required, and is empty: a sample needs a reward to learn from")
    elif stage.rewards and not any(one.weight for one in stage.rewards) and not stage.converses:
        yield Problem(
            "rewards",
            "every weight is 0, so no sample would have a reward to learn from; give one source a weight "
            "(1 is the default); the others may stay at 0 and are only logged",
        )
    if samples % group:
        yield Problem(
            "num_generations",
            f"{group} samples of each prompt don't fill {samples} (batch_size {stage.batch_size} x "
            f"steps_per_generation {stage.steps_per_generation}) evenly",
        )
    if group < 2 and stage.compares_samples:
        yield Problem("num_generations", f"{group}: {stage.type} compares a prompt's samples; at least 2")
    if stage.max_resampling_rounds and not stage.compares_samples:
        yield Problem(
            "max_resampling_rounds",
            f"{stage.type} does not compare a prompt's samples, so equal rewards cost it nothing; leave it "
            "out",
        )
    if stage.soft_punish_cache is not None and stage.soft_punish_cache > stage.max_completion_length:
        yield Problem(
            "soft_punish_cache",
            f"{stage.soft_punish_cache} tokens below max_completion_length: {stage.max_completion_length} "
            "are more than a sample has",
        )
    if stage.max_length is not None and stage.max_completion_length >= stage.max_length:
        yield Problem(
            "max_completion_length",
            f"{stage.max_completion_length} leaves a prompt no room within max_length: {stage.max_length}",
        )


def _turn_problems(stage: OnlineStage) -> Iterator[Problem]:
    if not stage.converses:
        for key in ("tool_parser", "max_tool_calling_iterations"):
            if getattr(stage, key) is not None:
                yield Problem(
                    key, "is for conversations: name an `env`, an `agent` or `tools`, or leave it out"
                )
        return
    if stage.agent and (others := [key for key in ("env", "tools") if getattr(stage, key)]):
        yield Problem(
            "agent",
            f"drives its conversations alone, and its requests name the tools: leave out "
            f"{' and '.join(others)}",
        )
    if stage.tools and stage.tool_parser is None:
        yield Problem(
            "tool_parser",
            "missing: name the parser of vLLM that finds the calls of `tools` in a turn, by the base's way "
            "to write them (hermes for Qwen, llama3_json, mistral, ...)",
        )
    if stage.tools and not stage.env and not stage.rewards:
        yield Problem("rewards", "is required: tools give no reward")
    if stage.env_on_error != "stop" and not math.isfinite(stage.env_on_error):
        yield Problem("env_on_error", "is `stop` or a finite number")
    if stage.soft_punish_cache is not None:
        yield Problem(
            "soft_punish_cache",
            "counts the tokens of an answer, and a conversation is more than its answers; leave it out, or "
            "let the environment reward short ones",
        )


def _kl_problems(stage: PolicyGradientStage) -> Iterator[Problem]:
    plain = stage.beta > 0 and stage.kl_in == "loss" and not stage.use_bias_correction_kl
    if plain and stage.kl_estimator == "k1":
        yield Problem(
            "kl_estimator",
            "k1 in a loss has a gradient of mean zero, whatever the divergence, without "
            "use_bias_correction_kl; use k2 (the divergence's own gradient) or k3, or kl_in: reward",
        )
    if stage.kl_target is not None and stage.beta == 0:
        yield Problem("kl_target", "steers beta by factors, and beta is 0; give beta a start value")


LOOSEST_CLIP = 5.0
"""Largest epsilon that still counts as clipping: CISPO's usual bound."""


def staleness_problems(stage: OnlineStage) -> Iterator[Problem]:
    """Every violation, by the keys of the stage."""
    if stage.sync.in_flight == "keep" and not stage.staleness:
        yield Problem(
            "sync.in_flight",
            "keep: with staleness 0 nothing is being sampled when new weights come; set staleness to 1 or "
            "more, or leave in_flight out",
        )
    if stage.sync.in_flight == "keep" and stage.sync.payload == "lora":
        yield Problem(
            "sync.in_flight",
            "keep: a sample that is half generated keeps the LoRA slot that it began with (vLLM has one for "
            "each request), so it would not go on with the new weights; set wait, or sync.payload to adapter",
        )
    if stage.learns_from == "advantages":
        yield from _correction_problems(stage)


def _correction_problems(stage: PolicyGradientStage) -> Iterator[Problem]:
    high, low = stage.vllm_importance_sampling_clip_max, stage.vllm_importance_sampling_clip_min
    mode = stage.vllm_importance_sampling_mode
    if high is not None and low is not None and low >= high:
        yield Problem(
            "vllm_importance_sampling_clip_min",
            f"{low:g} must be below vllm_importance_sampling_clip_max: {high:g}",
        )
    if stage.corrected and high is None and low is None:
        yield Problem(
            "vllm_importance_sampling_clip_max",
            f"null, as is vllm_importance_sampling_clip_min: {mode} bounds nothing then; set one of them "
            "(3 is TRL's clip_max)",
        )
    upper = stage.epsilon if stage.epsilon_high is None else stage.epsilon_high
    if stage.clips_to_engine and upper > LOOSEST_CLIP:
        key = "epsilon" if stage.epsilon_high is None else "epsilon_high"
        yield Problem(
            "staleness",
            f"{stage.staleness} with vllm_importance_sampling_correction: false and {key}: {upper:g}: "
            "nothing bounds what older samples do to the policy; leave the correction to its default, or set "
            f"{key} to {LOOSEST_CLIP:g} or less (0.2 is usual)",
        )

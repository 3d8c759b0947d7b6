"""What a stage may not ask for with samples of older weights. Pure: a stage in, violations out."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.problem import Problem
from pipeline.stages.specs.registry import PolicyGradientStage, RlStage

LOOSEST_CLIP = 5.0
"""Largest epsilon that still counts as clipping: CISPO's usual bound."""


def staleness_problems(stage: RlStage) -> Iterator[Problem]:
    """Every violation, by the keys of the stage."""
    if stage.sync.in_flight == "keep" and not stage.staleness:
        yield Problem(
            "sync.in_flight",
            "keep: with staleness 0 nothing is being drawn when new weights come; set staleness to 1 or "
            "more, or leave in_flight out",
        )
    if isinstance(stage, PolicyGradientStage):
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

"""Samples of older weights in the configuration: defaults, and what is refused with the reason."""

from __future__ import annotations

from typing import Any

from pipeline.config.load import validate
from pipeline.stages.specs.registry import GrpoStage


def of(**keys: Any) -> dict[str, str]:
    stage = {"data": "x", "rewards": "exact_match", **keys}
    _, problems = validate({"name": "a", "model": {"base": "b"}, "stages": {"grpo": stage}})
    return {p.path.removeprefix("stages.grpo."): p.message for p in problems}


def test_older_samples_are_corrected_and_present_ones_are_not() -> None:
    data: dict[str, Any] = {"data": [{"source": "x"}], "rewards": ["exact_match"]}
    strict, stale = GrpoStage(**data), GrpoStage(**data, staleness=1)
    assert (strict.corrected, strict.clips_to_engine) == (False, False)
    assert (stale.corrected, stale.clips_to_engine) == (True, False)
    uncorrected = GrpoStage(**data, staleness=1, vllm_importance_sampling_correction=False)
    assert (uncorrected.corrected, uncorrected.clips_to_engine) == (False, True)
    assert stale.correction().bounds == (float("-inf"), 3.0)


def test_settings_that_fit_are_not_refused() -> None:
    assert of(staleness=2, sync={"in_flight": "keep"}) == {}
    assert of(staleness=1, vllm_importance_sampling_correction=False) == {}
    assert of(staleness=1, vllm_importance_sampling_mode="token_mask",
              vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=5) == {}  # fmt: skip


def test_older_samples_with_neither_clipping_nor_correction_are_refused() -> None:
    found = of(staleness=1, vllm_importance_sampling_correction=False, epsilon_high=100)
    assert list(found) == ["staleness"]
    assert found["staleness"].startswith("1 with vllm_importance_sampling_correction: false and epsilon_high")
    assert of(staleness=0, vllm_importance_sampling_correction=False, epsilon_high=100) == {}


def test_a_correction_that_bounds_nothing_is_refused() -> None:
    found = of(staleness=1, vllm_importance_sampling_clip_max=None)
    assert "sequence_mask bounds nothing" in found["vllm_importance_sampling_clip_max"]
    found = of(vllm_importance_sampling_clip_min=3)
    assert found == {
        "vllm_importance_sampling_clip_min": "3 must be below vllm_importance_sampling_clip_max: 3"
    }


def test_keeping_what_is_not_in_flight_is_refused() -> None:
    assert "staleness 0" in of(sync={"in_flight": "keep"})["sync.in_flight"]


def test_samples_in_flight_can_not_change_their_lora_slot() -> None:
    found = of(staleness=1, sync={"in_flight": "keep", "payload": "lora"})
    assert "keeps the LoRA slot that it began with" in found["sync.in_flight"]
    assert of(staleness=1, sync={"payload": "lora"}) == {}

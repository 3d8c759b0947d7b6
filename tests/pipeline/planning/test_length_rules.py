"""Prompts and samples that an engine has no room for are found before anything is trained."""

from __future__ import annotations

from pathlib import Path

from actors.batches.generations import SamplingSpec
from pipeline.config.load import validate
from pipeline.config.run_config import RunConfig
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.batch_order import BatchOrder
from pipeline.data.tokens.prompts import PromptData
from pipeline.evaluation.held_out import EvalSet
from pipeline.planning.length_rules import engine_positions, held_out_problems, sample_problems
from pipeline.stages.prepared import PreparedRl
from pipeline.stages.specs.registry import RlStage


def run(base: Path, max_model_len: int | None = None) -> RunConfig:
    stage = {"data": "x", "rewards": "exact_match", "max_length": None, "max_completion_length": 10}
    roles = {"rollout": {"engine": {"max_model_len": max_model_len}}}
    data = {"name": "a", "model": {"base": str(base)}, "stages": {"grpo": stage}, "roles": roles}
    config, problems = validate(data)
    assert config is not None, problems
    return config


def prepared(config: RunConfig, *lengths: int) -> PreparedRl:
    spec = config.stages["grpo"]
    assert isinstance(spec, RlStage)
    n = len(lengths)
    data = PromptData(["q"] * n, ["q"] * n, [[1] * length for length in lengths], {}, Skipped(), "f")
    return PreparedRl(
        "grpo", spec, 0, data, BatchOrder(n, spec.prompts_per_step, 0, max_steps=1), spec.sampling()
    )


def test_an_engine_holds_what_is_asked_for_within_what_the_base_has(tiny_base: Path) -> None:
    assert engine_positions(run(tiny_base), 64) == 64
    assert engine_positions(run(tiny_base, 32), 64) == 32
    assert engine_positions(run(tiny_base), 100_000) == 4096
    assert engine_positions(run(tiny_base), None) == 4096


def test_a_prompt_with_its_completion_has_to_fit(tiny_base: Path) -> None:
    config = run(tiny_base)
    assert sample_problems(prepared(config, 5, 22), 32) == []
    (problem,) = sample_problems(prepared(config, 5, 23), 32)
    assert problem.startswith("stages.grpo.max_completion_length: the longest prompt has 23 tokens")
    assert "an engine holds 32" in problem


def test_a_held_out_prompt_has_to_leave_room_for_a_token() -> None:
    data = PromptData(["a", "b"], ["a", "b"], [[1] * 31, [1] * 32], {}, Skipped(), "f")
    held_out = EvalSet(data, SamplingSpec())
    assert held_out_problems(held_out, 33) == []
    (problem,) = held_out_problems(held_out, 32)
    assert problem.startswith("eval.data: 1 of 2 prompts leave no room")

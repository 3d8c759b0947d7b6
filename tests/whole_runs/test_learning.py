"""Online stages learn again what the documentation says: whole runs of the ready configs."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks.learning import CONFIGS, MORE, gain, learn
from tests.whole_runs.runs import lines_of

TOP_K = ("stages.distill.teacher_top_k=8",)
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.vllm]


@pytest.mark.parametrize("config", [*CONFIGS, "grpo-from-base-tiny", *(c for c in MORE if c != "kto-tiny")])
def test_a_rule_as_reward_raises_held_out_accuracy_far_above_the_start(config: str, tmp_path: Path) -> None:
    run = learn(config, 0, tmp_path / config)
    assert run["gain"]["low"] > 0.2
    last = list(run["eval"].values())[-1]
    assert last["n"] == 500
    assert last["ci95"][0] > 0.95


def test_every_stage_of_the_demo_beats_the_one_before(tmp_path: Path) -> None:
    run = learn("demo", 0, tmp_path / "demo")
    for earlier, later in (("base", "sft"), ("sft", "dpo"), ("dpo", "ppo")):
        assert gain(tmp_path / "demo", [earlier, later]).low > 0
    assert run["eval"]["dpo"]["ci95"][0] > run["eval"]["sft"]["ci95"][1]
    assert run["eval"]["reward"]["metric"] == "pair_accuracy"
    assert run["eval"]["reward"]["ci95"][0] > 0.8
    assert run["seconds"] < 480


def test_answers_that_are_right_or_not_teach_without_pairs(tmp_path: Path) -> None:
    run = learn("kto-tiny", 0, tmp_path / "kto-tiny")
    assert run["gain"]["low"] > 0.1


@pytest.mark.parametrize("how", [(), TOP_K], ids=["by sampled tokens", "by the teacher's best tokens"])
def test_a_student_becomes_like_its_teacher_on_its_own_samples(how: tuple[str, ...], tmp_path: Path) -> None:
    """The divergence per token from the DPO policy, which begins at what DPO has taught since SFT."""
    run = learn("distill-tiny", 0, tmp_path / "distill-tiny", *how)
    divergence = [line["kl"] for line in lines_of(tmp_path / "distill-tiny", "distill")]
    assert abs(statistics.mean(divergence[-10:])) < 0.2 * divergence[0]
    assert run["eval"]["distill"]["ci95"][0] > run["eval"]["sft"]["ci95"][1]


def test_conversations_with_hints_teach_to_be_right_at_the_first_try(tmp_path: Path) -> None:
    run = learn("../examples/second-try", 0, tmp_path / "second-try")
    first = [line["rewards/first_right/mean"] for line in lines_of(tmp_path / "second-try", "grpo")]
    assert statistics.mean(first[-5:]) > first[0] + 0.15
    assert run["gain"]["low"] > 0.2
    assert run["eval"]["grpo"]["ci95"][0] > 0.95

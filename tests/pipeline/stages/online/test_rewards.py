"""From the sources of a stage to the rewards of its samples, and the metrics of just these."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from actors.batches import Episode
from actors.batches.generations import Generations
from actors.batches.trajectories import trajectory_batch
from actors.errors import RunFailure
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.prompts import PromptData
from pipeline.stages.online.rewards import RewardComputer, Rewards
from pipeline.stages.specs.registry import DistillStage, GrpoStage

ANSWERS = ["7", "7", "8", "7"]
"""Of two prompts, two samples each; the last one is cut at the limit."""


def passes_the_last_over(completions: list[str], **_: Any) -> list[float | None]:
    return [1.0] * (len(completions) - 1) + [None]


def lengths_of(completions: list[str], **_: Any) -> list[float]:
    return [3.0] * len(completions)


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("rewards_of_this_test")
    module.__dict__.update(partly=passes_the_last_over, watched=lengths_of)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def rewards_of(
    *sources: str | dict[str, Any], conversed: dict[str, Any] | None = None, **settings: Any
) -> Rewards:
    """`conversed`: what samples have that conversed with an environment."""
    given = {"rewards": list(sources)} if sources else {}
    spec = GrpoStage(data=[{"source": "x"}], num_generations=2, max_completion_length=4, **given, **settings)
    ends = ((1, "stop"), (2, "stop"), (2, "stop"), (4, "length"))
    samples = Generations.of([([5] * n, [-1.0] * n, finish) for n, finish in ends], 2, "v", 0.0)
    if conversed is not None:
        samples = replace(Generations.of([([5], [-1.0], "stop")] * 5, 2, "v", 0.0), finish=samples.finish)
        samples = replace(samples, **conversed)
    prompts = PromptData(["q"] * 4, ["q"] * 4, [[1]] * 4, {"answer": ["7"] * 4}, Skipped(), "f")
    batch = trajectory_batch([[1]] * 4, samples)
    return RewardComputer(spec, {}).result({}, prompts, ANSWERS, samples, batch)


def test_what_only_a_monitor_scores_has_no_reward() -> None:
    watched = {"source": "rewards_of_this_test:watched", "weight": 0}
    found = rewards_of("rewards_of_this_test:partly", watched)
    assert found.values == pytest.approx([1, 1, 1, np.nan], nan_ok=True)
    assert found.metrics["reward"] == 1
    assert found.metrics["rewards/watched/mean"] == 3


def test_a_teacher_alone_rewards_no_sample() -> None:
    spec = DistillStage(data=[{"source": "x"}], teacher="a", missing_eos_penalty=0.5)
    samples = Generations.of([([5], [-1.0], "stop"), ([5], [-1.0], "length")], 1, "v", 0.0)
    prompts = PromptData(["q"] * 2, ["q"] * 2, [[1]] * 2, {}, Skipped(), "f")
    found = RewardComputer(spec, {}).result(
        {}, prompts, ["a", "b"], samples, trajectory_batch([[1]] * 2, samples)
    )
    assert found.values.tolist() == [0, -0.5]
    assert found.metrics == {}


def test_what_an_environment_gave_is_added_to_other_rewards_under_its_name() -> None:
    turn_rewards = np.array([1.0, np.nan, np.nan, 0.5, 0.25])
    conversed = {
        "turn_rewards": turn_rewards,
        "offsets": np.array([0, 1, 2, 4, 5]),
        "episodes": tuple(
            Episode([1], "q", [], [{"role": "assistant", "content": text}], 1, "done") for text in "7787"
        ),
    }
    found = rewards_of("exact_match", env="worlds:Guess", conversed=conversed)
    assert found.values.tolist() == [2.0, 1.0, 0.5, 1.25]
    assert found.metrics["rewards/Guess/mean"] == pytest.approx((1 + 0.5 + 0.25) / 3)
    alone = rewards_of(env="worlds:Guess", conversed=conversed)
    assert alone.values == pytest.approx([1.0, np.nan, 0.5, 0.25], nan_ok=True)
    nothing = conversed | {"turn_rewards": np.full(5, np.nan)}
    with pytest.raises(RunFailure, match=r"environment 'Guess'.*gave no sample"):
        rewards_of(env="worlds:Guess", conversed=nothing)


def test_metrics_are_of_the_rewards_that_advantages_use() -> None:
    plain = rewards_of("exact_match")
    assert plain.values.tolist() == [1, 1, 0, 1]
    assert plain.metrics["frac_reward_zero_std"] == 0.5
    found = rewards_of("exact_match", missing_eos_penalty=0.5, soft_punish_cache=2, soft_punish_weight=0.5)
    assert found.values.tolist() == [1, 1, 0, 0]
    assert found.metrics["reward"] == found.values.mean() == 0.5
    assert found.metrics["reward_std"] == pytest.approx(found.values.std(ddof=1))
    assert found.metrics["frac_reward_zero_std"] == 1
    assert found.metrics["rewards/exact_match/mean"] == 0.75
    assert found.metrics["rewards/overlong/mean"] == -0.25

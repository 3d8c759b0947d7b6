"""Dynamic sampling: which prompts are drawn again, with what, and that it is the same each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.batches.generations import Generations
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.tokens.batch_order import BatchOrder
from pipeline.data.tokens.prompts import PromptData
from pipeline.stages.online.dynamic_sampling import sampler_of, substitutes
from pipeline.stages.online.rewards import RewardComputer
from pipeline.stages.online.sampler import SampledBatch
from pipeline.stages.prepared import PreparedRl
from pipeline.stages.specs.registry import GrpoStage

N_ROWS, GROUP = 12, 2


class Engines:
    """Answers are right (7) or wrong by row: `mixed` rows once each, others always or never."""

    def __init__(self, mixed: set[int]) -> None:
        self.mixed, self.asked = mixed, []

    def expert_load(self) -> list[np.ndarray]:
        return []

    def generate(self, prompts: list[list[int]], sampling: Any, seeds: list[int]) -> Generations:
        self.asked.append([ids[0] for ids in prompts])
        assert len(set(seeds)) == len(seeds)
        sampled = [([self.token(row, i)], [-1.0], "stop") for row in self.asked[-1] for i in range(GROUP)]
        return Generations.of(sampled, GROUP, "v", 0.0)

    def token(self, row: int, i: int) -> int:
        if row in self.mixed:
            return 7 if i == 0 else 8
        return 7 if row % 3 == 0 else 8


class Tokenizer:
    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [str(one[0]) for one in ids]


def sampled(mixed: set[int], rounds: int, step: int = 0) -> tuple[SampledBatch, Engines]:
    spec = GrpoStage(
        data=[{"source": "builtin:arithmetic", "split": "prompts"}], rewards=["exact_match"], batch_size=8,
        num_generations=GROUP, max_resampling_rounds=rounds,
    )  # fmt: skip
    rows = list(range(N_ROWS))
    data = PromptData(
        [str(r) for r in rows], [str(r) for r in rows], [[r] for r in rows], {"answer": ["7"] * N_ROWS},
        Skipped(), "f",
    )  # fmt: skip
    stage = PreparedRl("grpo", spec, 3, data, BatchOrder(N_ROWS, 4, 3, max_steps=3), spec.sampling())
    engines = Engines(mixed)
    sampler = sampler_of(stage, engines, RewardComputer(spec, {}), Tokenizer())  # type: ignore[arg-type]
    return sampler.sample(step), engines


def test_without_rounds_samples_stay_as_they_are() -> None:
    found, engines = sampled(set(), rounds=0)
    assert found.rewards is None
    assert len(engines.asked) == 1


def test_prompts_without_spread_make_room_for_others() -> None:
    first = set(sampled(set(), rounds=0)[0].rows.tolist())
    mixed = set(range(N_ROWS)) - first | {min(first)}  # one of the step's own, and all others
    found, engines = sampled(mixed, rounds=2)
    assert [len(rows) for rows in engines.asked] == [4, 3]
    assert not set(engines.asked[1]) & first
    assert sorted(found.rows.tolist()) == sorted([min(first), *engines.asked[1]])
    assert found.prompts.token_ids == [[row] for row in found.rows for _ in range(GROUP)]
    assert found.samples.token_ids.tolist() == [7, 8] * 4
    assert found.rewards is not None
    assert found.rewards.values.tolist() == [1.0, 0.0] * 4
    assert found.metrics["dynamic_sampling/rounds"] == 1
    assert found.metrics["dynamic_sampling/prompts"] == 7
    assert found.metrics["dynamic_sampling/frac_zero_std_left"] == 0
    # what the policy is worth is what the step's own prompts say
    assert found.metrics["frac_reward_zero_std"] == 0.75


def test_rounds_end_and_what_has_no_spread_by_then_stays() -> None:
    found, engines = sampled(set(), rounds=1)
    assert [len(rows) for rows in engines.asked] == [4, 4]
    assert sorted(found.rows.tolist()) == sorted(engines.asked[0])
    assert found.metrics["dynamic_sampling/frac_zero_std_left"] == 1
    found, engines = sampled(set(), rounds=9)
    assert [len(rows) for rows in engines.asked] == [4, 4, 4]  # then every prompt was asked


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_that_is_drawn_again_is_the_same(step: int) -> None:
    mixed = {0, 1, 2, 5, 7, 11}
    (one, first), (other, second) = sampled(mixed, 3, step), sampled(mixed, 3, step)
    assert one.rows.tolist() == other.rows.tolist()
    assert first.asked == second.asked


def test_substitutes_follow_from_their_seed_and_are_new() -> None:
    found = substitutes(10, {0, 1, 2}, 4, (3, 0, 1))
    assert len(set(found.tolist())) == 4
    assert not set(found.tolist()) & {0, 1, 2}
    assert found.tolist() == substitutes(10, {0, 1, 2}, 4, (3, 0, 1)).tolist()
    assert found.tolist() != substitutes(10, {0, 1, 2}, 4, (3, 0, 2)).tolist()
    assert substitutes(3, {0, 1, 2}, 4, (3, 0, 1)).tolist() == []

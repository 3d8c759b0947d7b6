"""Online DPO: which samples become pairs, what the reference says of them, and the optimizer steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.algorithms.dpo import OnlineDpoLoss
from actors.batches.generations import Generations
from actors.batches.trajectories import trajectory_batch
from actors.errors import InvariantViolation
from pipeline.stages.online.estimates import TokenScores
from pipeline.stages.online.objectives import PreferencePairs, objective_of
from pipeline.stages.online.preference_pairs import best_and_worst, pairs_of
from pipeline.stages.specs.registry import OnlineDpoStage

NAN = float("nan")


def stage(**settings: Any) -> OnlineDpoStage:
    data = [{"source": "builtin:arithmetic", "split": "prompts"}]
    return OnlineDpoStage(**{"data": data, "rewards": ["exact_match"], "num_generations": 2, **settings})


@pytest.mark.parametrize(
    ("rewards", "n", "pairs"),
    [
        ([0.0, 1.0, 0.5, 3.0, 3.0, 3.0], 3, [[1, 0]]),
        ([1.0, 2.0, 2.0, 1.0], 4, [[1, 0]]),  # of equal ones the first
        ([NAN, 2.0, 1.0, NAN, NAN, 5.0], 3, [[1, 2]]),
        ([1.0, 0.0, 0.0, 1.0], 2, [[0, 1], [3, 2]]),
        ([1.0, 1.0], 2, []),
    ],
)
def test_a_prompts_best_and_worst_samples_are_its_pair(
    rewards: list[float], n: int, pairs: list[list[int]]
) -> None:
    assert best_and_worst(np.array(rewards), n).tolist() == pairs


def samples() -> tuple[Any, TokenScores]:
    """Two prompts of two samples with 1, 2, 3 and 1 tokens."""
    drawn = Generations.of([([7] * n, [-1.0] * n, "stop") for n in (1, 2, 3, 1)], 2, "v", 0.0)
    batch = trajectory_batch([[1, 2], [1, 2], [3], [3]], drawn)
    ref = np.array([-1.0, -2.0, -0.5, -1.0, -1.0, -1.0, -4.0])
    return batch, TokenScores(ref + 0.5, ref)


def test_pairs_carry_the_sums_of_the_references_log_probabilities() -> None:
    batch, scores = samples()
    found = pairs_of(stage(), batch, np.array([0.0, 2.0, 1.0, -1.0]), scores)
    assert found.batch.sequences_per_row == 2
    assert found.batch.token_ids.tolist() == [1, 2, 7, 7, 1, 2, 7, 3, 7, 7, 7, 3, 7]
    assert found.batch.columns["ref_chosen_logps"].tolist() == [-2.5, -3.0]
    assert found.batch.columns["ref_rejected_logps"].tolist() == [-1.0, -4.0]
    assert found.signal.tolist() == [2.0, 2.0]
    assert found.metrics["frac_pairs"] == 1.0
    assert found.metrics["objective/kl"] == pytest.approx(0.5 * 7 / 4)


def test_tokens_beyond_the_shared_length_weigh_ld_alpha_in_the_reference_too() -> None:
    batch, scores = samples()
    found = pairs_of(stage(ld_alpha=0.5), batch, np.array([0.0, 2.0, 1.0, -1.0]), scores)
    assert found.batch.columns["ref_chosen_logps"].tolist() == [-2.25, -2.0]


def test_samples_of_equal_rewards_give_no_pair_and_nothing_to_learn() -> None:
    batch, scores = samples()
    found = pairs_of(stage(), batch, np.ones(4), scores)
    assert (found.batch.n_rows, found.signal.size, found.metrics["frac_pairs"]) == (0, 0, 0.0)
    assert found.batch.select([]).n_rows == 0


def test_there_are_as_many_optimizer_steps_however_few_pairs_there_are() -> None:
    objective = objective_of(stage(batch_size=4, steps_per_generation=4, num_iterations=2))
    assert isinstance(objective, PreferencePairs)
    for pairs in (8, 5, 1, 0):
        parts = objective.minibatches(pairs, samples=16, seed=3, step=1)
        assert len(parts) == 8
        assert sorted(np.concatenate(parts[:4]).tolist()) == list(range(pairs))
    assert [p.tolist() for p in objective.minibatches(8, 16, 3, 1)] != [
        p.tolist() for p in objective.minibatches(8, 16, 3, 2)
    ]


def test_the_loss_is_dpos_at_the_sampling_temperature() -> None:
    loss = objective_of(stage(temperature=0.7, beta=0.3, loss_type="ipo")).loss(0.3, "float32")
    assert isinstance(loss, OnlineDpoLoss)
    assert (loss.logit_temperature, loss.beta, loss.loss_type) == (0.7, 0.3, ["ipo"])


def test_the_first_update_must_see_the_reference() -> None:
    objective = objective_of(stage())
    start = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "loss": np.log(2), "pairs": 3.0}
    objective.check_first(start, "float32", at_reference=True)
    objective.check_first({**start, "loss": 0.0, "pairs": 0.0}, "float32", at_reference=True)
    objective.check_first({**start, "loss": 0.5}, "float32", at_reference=False)
    with pytest.raises(InvariantViolation, match="the reference is not what the policy started from"):
        objective.check_first({**start, "loss": 0.5}, "float32", at_reference=True)

"""Advantages against literals that were computed from the written formulas, and against a slow loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from actors.algorithms.advantages import (
    ADVANTAGES,
    AdvantageSpec,
    Scored,
    advantages_of,
    gae,
    group_relative,
    leave_one_out,
    whiten,
)

REWARDS, VALUES = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.4, 0.3])
ADVANTAGES_LITERAL = [0.43675, 0.565, 0.7]
WHITENED = [-0.991344, -0.017092, 1.008436]


def slow_gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> list[float]:
    """One sample, token by token from its end."""
    advantages, advantage, after = [], 0.0, 0.0
    for reward, value in zip(rewards[::-1], values[::-1], strict=True):
        advantage = reward + gamma * after - value + gamma * lam * advantage
        after = value
        advantages.append(advantage)
    return advantages[::-1]


def scored(rewards: list[float], lengths: list[int], **fields: np.ndarray) -> Scored:
    offsets = np.cumsum([0, *lengths])
    columns = {"token_rewards": np.zeros(offsets[-1]), **fields}
    return Scored(np.array(rewards, dtype=np.float64), offsets, **columns)


def test_gae_has_the_literal_advantages_and_returns() -> None:
    advantages, returns = gae(REWARDS, VALUES, np.array([0, 3]), 1.0, 0.95)
    assert advantages == pytest.approx(ADVANTAGES_LITERAL, abs=1e-12)
    assert returns == pytest.approx([0.93675, 0.965, 1.0], abs=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_of_many_samples_equals_a_loop_over_each(gamma: float, lam: float) -> None:
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 12, size=9)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rewards, values = generator.normal(size=(2, offsets[-1]))
    expected = [
        advantage
        for start, end in itertools.pairwise(offsets)
        for advantage in slow_gae(rewards[start:end], values[start:end], gamma, lam)
    ]
    assert gae(rewards, values, offsets, gamma, lam)[0] == pytest.approx(expected, abs=1e-12)


def test_nothing_flows_over_the_end_of_a_sample() -> None:
    """The second sample's reward and values must not reach the first, whichever way that one ended."""
    both = gae(np.append(REWARDS, 100.0), np.append(VALUES, 50.0), np.array([0, 3, 4]), 1.0, 0.95)[0]
    assert both[:3] == pytest.approx(ADVANTAGES_LITERAL, abs=1e-12)
    assert both[3] == pytest.approx(50.0)


def test_gae_puts_the_reward_on_the_last_token_and_the_divergence_on_every_token() -> None:
    kl = np.array([-0.1, 0.0, 0.2, -0.3])
    spec = AdvantageSpec(kind="gae", gamma=1.0, lam=1.0)
    found = advantages_of(spec, scored([1.0, 2.0], [3, 1], token_rewards=kl, values=np.zeros(4)))
    assert found.returns == pytest.approx([1.1, 1.2, 1.2, 1.7])


def test_gae_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="critic"):
        advantages_of(AdvantageSpec(kind="gae"), scored([1.0], [2]))


def test_a_sample_without_tokens_is_refused() -> None:
    """Its last token would be that of the sample before."""
    with pytest.raises(ValueError, match=r"samples \[1\]"):
        scored([1.0, 2.0], [2, 0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("shift_and_scale", WHITENED), ("scale", [x + 0.56725 for x in WHITENED]), ("none", ADVANTAGES_LITERAL)],
)
def test_whitening_uses_the_unbiased_variance(kind: str, expected: list[float]) -> None:
    assert whiten(np.array(ADVANTAGES_LITERAL), kind) == pytest.approx(expected, abs=2e-6)


def test_masked_tokens_neither_enter_whitening_nor_are_changed_by_it() -> None:
    values, mask = np.array([0.43675, 99.0, 0.565, 0.7]), np.array([True, False, True, True])
    whitened = whiten(values, "shift_and_scale", mask)
    assert whitened[mask] == pytest.approx(WHITENED, abs=2e-6)
    assert whitened[1] == 99.0


def test_whitening_of_one_token_gives_zero() -> None:
    assert whiten(np.array([3.0]), "shift_and_scale") == pytest.approx([0.0])


def test_gae_whitens_advantages_but_not_returns() -> None:
    spec = AdvantageSpec(kind="gae", whiten_advantages="shift_and_scale")
    found = advantages_of(spec, scored([1.0], [3], values=VALUES))
    assert found.advantages == pytest.approx(WHITENED, abs=2e-6)
    assert found.returns == pytest.approx([0.93675, 0.965, 1.0])


GROUPS = [1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("scale", "first"),
    # unbiased: std of (1, 0, 0, 1) is sqrt(1/3) = .577350, of all eight sqrt(41.5/7) = 2.434866
    [("group", 0.5 / 0.577450), ("batch", 0.5 / 2.434966), ("none", 0.5)],
)
def test_group_advantages_have_the_literal_values(scale: str, first: float) -> None:
    expected = [first, -first, -first, first, 0, 0, 0, 0]
    assert group_relative(np.array(GROUPS), 4, scale) == pytest.approx(expected, abs=2e-6)


def test_leave_one_out_takes_the_mean_of_the_others() -> None:
    assert leave_one_out(np.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3) == pytest.approx(
        [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0]
    )


def test_samples_without_a_reward_count_nowhere() -> None:
    nan = float("nan")
    assert leave_one_out(np.array([1.0, nan, 3.0]), 3) == pytest.approx([-2.0, 0.0, 2.0])
    assert group_relative(np.array([1.0, nan, 3.0]), 3, "none") == pytest.approx([-1.0, 0.0, 1.0])
    alone = np.array([4.0, nan, nan])
    assert leave_one_out(alone, 3).tolist() == group_relative(alone, 3, "group").tolist() == [0.0, 0.0, 0.0]


def test_gae_of_a_sample_without_a_reward_teaches_neither_policy_nor_critic() -> None:
    values = np.array([0.5, 0.4, 0.3, 7.0, 8.0])
    spec = AdvantageSpec(kind="gae", whiten_advantages="shift_and_scale")
    found = advantages_of(spec, scored([1.0, float("nan")], [3, 2], values=values))
    assert found.advantages == pytest.approx([*WHITENED, 0.0, 0.0], abs=2e-6)
    assert found.returns is not None
    assert found.returns[3:].tolist() == [7.0, 8.0]


@pytest.mark.parametrize("kind", ["group", "rloo"])
def test_every_token_has_its_samples_advantage_and_divergence_counts_in_the_reward(kind: str) -> None:
    tokens = np.array([-0.5, -0.5, 0.0])
    spec = AdvantageSpec(kind=kind, num_generations=2, scale_rewards="none")
    found = ADVANTAGES[kind](spec, scored([3.0, 1.0], [2, 1], token_rewards=tokens))
    size = {"group": 0.5, "rloo": 1.0}[kind]
    assert found.advantages == pytest.approx([size, size, -size])
    assert found.returns is None


def test_whitening_of_sample_advantages_does_not_weigh_long_samples_more() -> None:
    spec = AdvantageSpec(
        kind="rloo", num_generations=2, whiten_advantages="shift_and_scale", scale_rewards="none"
    )
    found = advantages_of(spec, scored([3.0, 1.0], [5, 1]))
    assert found.advantages == pytest.approx([2**-0.5] * 5 + [-(2**-0.5)])


def test_reinforce_pp_has_the_literal_returns() -> None:
    """Reward 1 at the end, KL penalties before it: A_t = R - beta sum of KL from t on (eq. 8)."""
    tokens = np.array([-0.1, -0.2, -0.3, 0.0])
    plain = AdvantageSpec(kind="reinforce")
    found = advantages_of(plain, scored([1.0, -2.0], [3, 1], token_rewards=tokens))
    assert found.advantages == pytest.approx([0.4, 0.5, 0.7, -2.0])
    assert found.returns is None
    halved = AdvantageSpec(kind="reinforce", gamma=0.5)
    assert advantages_of(halved, scored([1.0], [3])).advantages == pytest.approx([0.25, 0.5, 1.0])


def test_a_token_that_a_teacher_scores_answers_for_itself_or_also_for_what_follows() -> None:
    """Distillation: r_t = log q - log p is all of a token's advantage with gamma 0, and the sum from there on
    with gamma 1."""
    tokens = np.array([-0.1, 0.2, -0.3, 0.5])
    alone = AdvantageSpec(kind="reinforce", gamma=0.0)
    whole = AdvantageSpec(kind="reinforce", gamma=1.0)
    asked = scored([0.0, 0.0], [3, 1], token_rewards=tokens)
    assert advantages_of(alone, asked).advantages == pytest.approx([-0.1, 0.2, -0.3, 0.5])
    assert advantages_of(whole, asked).advantages == pytest.approx([-0.2, -0.1, -0.3, 0.5])


def test_reinforce_pp_is_normalised_over_all_tokens_of_the_generation() -> None:
    """Returns 1, 1, 1, -1 over tokens: mean 0.5, unbiased variance 1 (eq. 10)."""
    spec = AdvantageSpec(kind="reinforce", whiten_advantages="shift_and_scale")
    found = advantages_of(spec, scored([1.0, -1.0], [3, 1]))
    assert found.advantages == pytest.approx([0.5, 0.5, 0.5, -1.5])


def test_reinforce_pp_with_a_baseline_compares_the_samples_of_a_prompt_first() -> None:
    spec = AdvantageSpec(kind="reinforce", baseline="group", num_generations=2)
    found = advantages_of(spec, scored([3.0, 1.0, 5.0, float("nan")], [1, 2, 1, 1]))
    assert found.advantages == pytest.approx([1.0, -1.0, -1.0, 0.0, 0.0])


@pytest.mark.parametrize("reward", [0.1, 1e9 + 0.1])
@pytest.mark.parametrize("kind", ["group", "rloo", "reinforce"])
def test_equal_rewards_teach_exactly_nothing(kind: str, reward: float) -> None:
    """Their mean rounds (0.1 three times: 1e-17 away), and an optimizer makes usual steps of any gradient."""
    spec = AdvantageSpec(kind=kind, num_generations=3, baseline="group", whiten_advantages="shift_and_scale")
    assert advantages_of(spec, scored([reward] * 6, [1] * 6)).advantages.tolist() == [0.0] * 6
    assert whiten(np.full(7, reward), "shift_and_scale").tolist() == [0.0] * 7


TURNS = np.array([0.0, 0.25, 0.0, 1.0, 0.0, -0.5])
"""Two samples of two turns each, of 2 + 2 and 1 + 1 tokens; the second one's first turn earns nothing."""


def turned(kind: str, rewards: list[float], turn_rewards: np.ndarray | None) -> np.ndarray:
    spec = AdvantageSpec(kind=kind, num_generations=2, scale_rewards="none", lam=1.0, gamma=1.0)
    values = np.zeros(6)
    return advantages_of(spec, scored(rewards, [4, 2], values=values, turn_rewards=turn_rewards)).advantages


@pytest.mark.parametrize("kind", ["gae", "reinforce"])
def test_a_reward_of_a_turn_counts_from_that_turn_backwards(kind: str) -> None:
    # By hand: of 1.5 in all 0.25 is earned by the second token and 1.0 by the last, which also gets the rest.
    expected = [1.5, 1.5, 1.25, 1.25, -0.5, -0.5]
    assert turned(kind, [1.5, -0.5], TURNS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["group", "rloo"])
def test_advantages_of_whole_samples_take_the_sum_of_their_turns_rewards(kind: str) -> None:
    assert turned(kind, [1.5, -0.5], TURNS).tolist() == turned(kind, [1.5, -0.5], None).tolist()


@pytest.mark.parametrize("kind", sorted(ADVANTAGES))
def test_rewards_at_the_end_of_the_only_turn_are_those_of_the_sample_bit_for_bit(kind: str) -> None:
    rewards, kl = [0.1 + 0.2, -1 / 3], np.random.default_rng(0).normal(size=6)
    spec = AdvantageSpec(kind=kind, num_generations=2, whiten_advantages="shift_and_scale")
    given = {"values": kl[::-1].copy(), "token_rewards": kl}
    at_end = np.array([0.0, 0.0, 0.0, rewards[0], 0.0, rewards[1]])
    plain, turns = (
        advantages_of(spec, scored(rewards, [4, 2], turn_rewards=found, **given)) for found in (None, at_end)
    )
    assert plain.advantages.tobytes() == turns.advantages.tobytes()

"""Penalties that are taken off rewards, by literals."""

from __future__ import annotations

import numpy as np
import pytest

from actors.algorithms.reward_shaping import soft_overlong_punishment, without_spread


def test_the_overlong_punishment_falls_linearly_to_minus_1_at_the_limit() -> None:
    """DAPO's own numbers: 20,480 tokens at most, the last 4,096 of them punished."""
    lengths = np.array([1, 16_384, 17_408, 18_432, 20_480, 20_481])
    found = soft_overlong_punishment(lengths, 20_480, 4_096)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


@pytest.mark.trl
def test_the_overlong_punishment_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=30)
    found = soft_overlong_punishment(np.arange(1, 120), 100, 30)
    assert found == pytest.approx(theirs(completion_ids=[[0] * n for n in range(1, 120)]))


def test_a_group_has_no_spread_where_all_scored_samples_are_equal_or_none_is() -> None:
    nan = float("nan")
    rewards = np.array([1.0, 1.0, 1.0, 0.0, nan, 2.0, nan, nan])
    assert without_spread(rewards, 2).tolist() == [True, False, True, True]

"""The reward loss against literals that were computed from the written formula."""

from __future__ import annotations

import pytest
import torch

from actors.algorithms.loss import LARGEST, SMALLEST, TokenView
from actors.algorithms.reward import RewardLoss

CHOSEN, REJECTED = [2.0, 0.5], [1.0, 1.5]


def pairs(chosen: list[float], rejected: list[float], **columns: list[float]) -> TokenView:
    """Scored pairs whose sequences have one counted token each."""
    scores = torch.tensor([x for pair in zip(chosen, rejected, strict=True) for x in pair])
    zeros = torch.zeros(len(scores))
    return TokenView(
        zeros, torch.arange(len(scores)), len(scores), zeros, zeros.bool(), zeros, zeros,
        {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}, 2,
        scores=scores,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "coefficient", "expected"),
    [
        ({}, None, [0.313262, 1.313262]),
        ({"margin": [0.5, 0.0]}, None, [0.474077, 1.313262]),
        ({}, 0.01, [0.313262 + 0.09, 1.313262 + 0.04]),
    ],
    ids=["plain", "margin", "centered"],
)
def test_every_pair_has_the_value_of_the_formula(
    columns: dict[str, list[float]], coefficient: float | None, expected: list[float]
) -> None:
    loss = RewardLoss(center_rewards_coefficient=coefficient)
    for row, value in enumerate(expected):
        one = {name: [values[row]] for name, values in columns.items()}
        found, _ = loss(pairs([CHOSEN[row]], [REJECTED[row]], **one), {"pairs": 1.0})
        assert found.item() == pytest.approx(value, abs=1e-6)


def test_the_mean_and_what_centering_adds() -> None:
    view, totals = pairs(CHOSEN, REJECTED), {"pairs": 2.0}
    plain = RewardLoss()(view, totals)[0].item()
    assert plain == pytest.approx(0.813262, abs=1e-6)
    centered = RewardLoss(center_rewards_coefficient=0.01)(view, totals)[0].item()
    assert centered - plain == pytest.approx(0.065, abs=1e-9)


def test_metrics_are_sums_and_extremes() -> None:
    metrics = RewardLoss()(pairs([2.0, 0.5, 1.0], [1.0, 1.5, 1.0]), {"pairs": 3.0})[1]
    assert (metrics["accuracy"][0].item(), metrics["accuracy"][1]) == (1, 3.0), "a tie is no success"
    assert metrics["margin"][0].item() == pytest.approx(0.0)
    assert (metrics["mean_reward"][0].item(), metrics["mean_reward"][1]) == (7.0, 6.0)
    assert (metrics["min_reward"][0].item(), metrics["min_reward"][1]) == (0.5, SMALLEST)
    assert (metrics["max_reward"][0].item(), metrics["max_reward"][1]) == (2.0, LARGEST)

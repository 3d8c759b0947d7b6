"""The critic's loss: literals, clipping, masks, gradient; and explained variance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.algorithms.value import ValueLoss, explained_variance
from actors.batches.batch import Batch
from tests.actors.algorithms.test_policy import view_of

TOTALS = {"tokens": 3.0}
VALUES, OLD, RETURNS = [1.0, 0.0, 2.0], [0.5, 0.0, 0.0], [2.0, 1.0, 0.0]


def parts(loss: ValueLoss, mask: list[bool] | None = None) -> tuple[float, list[float], dict[str, float]]:
    columns = {"old_values": OLD, "returns": RETURNS} | ({} if mask is None else {"mask": mask})
    values = torch.tensor(VALUES, requires_grad=True)
    value, metrics = loss(replace(view_of([0.0] * 3, [3], **columns), values=values), TOTALS)
    means = {name: float(total / weight if weight else total) for name, (total, weight) in metrics.items()}
    return value.item(), torch.autograd.grad(value, values)[0].tolist(), means


def test_without_clipping_it_is_half_the_mean_squared_error() -> None:
    value, gradient, means = parts(ValueLoss(vf_coef=1.0, cliprange_value=None))
    assert value == pytest.approx(0.5 * (1 + 1 + 4) / 3)
    assert gradient == pytest.approx([-1 / 3, -1 / 3, 2 / 3])
    assert means["value_loss"] == value
    assert means["value_clip_ratio"] == 0.0


def test_a_value_that_moved_too_far_towards_its_return_has_no_gradient() -> None:
    """1.0 came from 0.5 and is held at 0.7: (0.7 - 2)^2 = 1.69. 2.0 moved away from its return: 4 counts."""
    value, gradient, means = parts(ValueLoss(vf_coef=1.0, cliprange_value=0.2))
    assert value == pytest.approx(0.5 * (1.69 + 1 + 4) / 3)
    assert gradient == pytest.approx([0.0, -1 / 3, 2 / 3])
    assert means["value_clip_ratio"] == pytest.approx(1 / 3)


def test_vf_coef_scales_the_loss_and_not_its_metric() -> None:
    value, _, means = parts(ValueLoss(vf_coef=0.1, cliprange_value=None))
    assert value == pytest.approx(0.1)
    assert means["value_loss"] == pytest.approx(1.0)


def test_masked_tokens_count_nowhere() -> None:
    loss = ValueLoss(vf_coef=1.0, cliprange_value=None)
    _, gradient, means = parts(loss, mask=[True, True, False])
    assert gradient[2] == 0.0
    assert means["values/mean"] == pytest.approx(0.5)
    assert means["returns/mean"] == pytest.approx(1.5)
    batch = Batch.from_sequences([[1, 2, 3, 4]], [[False, True, True, True]])
    assert loss.totals(batch) == {"tokens": 3.0}
    masked = batch.with_token_columns(mask=np.array([True, True, False]))
    assert loss.totals(masked) == {"tokens": 2.0}


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_one_that_knows_the_mean() -> None:
    returns = np.array([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(np.full(4, 3.0), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(np.zeros(4), np.ones(4)) == 0.0
    only = np.array([True, True, False, False])
    assert explained_variance(np.array([1.0, 2.0, 0.0, 0.0]), returns, only) == 1.0

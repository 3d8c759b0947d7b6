"""Preference losses against literals that were computed from the written formulas."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actors.algorithms.dpo import DIVERGENT, DpoLoss, LossType, ld_weights, sequence_logps
from actors.algorithms.loss import TokenView
from actors.algorithms.preference import PAIR_LOSSES
from actors.batches.batch import Batch
from actors.errors import InvariantViolation

PI_W, PI_L = [-0.5, -10.0, -1.0], [-0.1, -30.0, -21.0]
REF_W, REF_L = [-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1]

LITERALS = {
    "sigmoid": [0.693147, 0.313262, 0.126928],
    "hinge": [1, 0, 0],
    "ipo": [25, 25, 225],
    "nca_pair": [1.386294, 1.195220, 1.122047],
    "bco_pair": [1.386294, 1.004121, 0.855775],
    "sppo_hard": [50, 48.019993, 287.619995],
    "apo_zero": [1, 0.768412, 0.632557],
    "apo_down": [1, 0.771441, 0.596718],
    "discopop": [0.846574, 0.367879, 0.135335],
    "sigmoid_norm": [0.693147, 0.313262, 0.126928],
}
SMOOTHED = {
    "cdpo": [0.693147, 0.413262, 0.326928],
    "robust": [0.693147, 0.188262, -0.123072],
}


def one_token_pairs(
    pi_w: list[float], pi_l: list[float], ref_w: list[float], ref_l: list[float]
) -> TokenView:
    """Pairs whose answers are one token long, chosen first."""
    logps = torch.tensor([x for pair in zip(pi_w, pi_l, strict=True) for x in pair])
    n = len(logps)
    zeros = torch.zeros(n)
    columns = {"ref_chosen_logps": torch.tensor(ref_w), "ref_rejected_logps": torch.tensor(ref_l)}
    return TokenView(logps, torch.arange(n), n, zeros, zeros.bool(), zeros, zeros, columns, 2)


FIXTURE = one_token_pairs(PI_W, PI_L, REF_W, REF_L)
TOTALS = {"rows": 3.0, "chosen_tokens": 3.0}


def per_row(loss: DpoLoss) -> list[float]:
    values = []
    for row in range(3):
        view = one_token_pairs([PI_W[row]], [PI_L[row]], [REF_W[row]], [REF_L[row]])
        values.append(loss(view, {"rows": 1.0, "chosen_tokens": 1.0})[0].item())
    return values


@pytest.mark.parametrize("name", LITERALS)
def test_losses_have_the_literal_values(name: str) -> None:
    assert per_row(DpoLoss(loss_type=name)) == pytest.approx(LITERALS[name], rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothed_losses_have_the_literal_values(name: str) -> None:
    assert per_row(DpoLoss(loss_type=name, label_smoothing=0.1)) == pytest.approx(SMOOTHED[name], abs=2e-6)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    loss, _ = DpoLoss()(FIXTURE, TOTALS)
    assert loss.item() == pytest.approx(sum(LITERALS["sigmoid"]) / 3, abs=1e-6)


def test_several_losses_add_up_with_their_weights_and_are_reported_apart() -> None:
    loss, metrics = DpoLoss(loss_type=["sigmoid", "sft"], loss_weights=[2.0, 0.5])(FIXTURE, TOTALS)
    nll = -sum(PI_W) / 3
    assert metrics["loss/sft"][0].item() == pytest.approx(nll)
    assert loss.item() == pytest.approx(2 * sum(LITERALS["sigmoid"]) / 3 + 0.5 * nll, rel=1e-6)


def test_aot_sorts_margins_over_the_batch() -> None:
    ours, _ = DpoLoss(loss_type="aot")(FIXTURE, TOTALS)
    policy = sorted(w - line for w, line in zip(PI_W, PI_L, strict=True))
    reference = sorted(w - line for w, line in zip(REF_W, REF_L, strict=True))
    expected = [math.log1p(math.exp(-0.1 * (a - b))) for a, b in zip(policy, reference, strict=True)]
    assert ours.item() == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_every_named_loss_exists() -> None:
    assert set(get_args(LossType)) == set(PAIR_LOSSES) | {"sft"}


DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@pytest.mark.parametrize(
    ("name", "divergence"),
    [(n, d) for n in sorted(PAIR_LOSSES) for d in DIVERGENCES if d == "reverse_kl" or n in DIVERGENT],
)
def test_the_start_value_is_the_loss_of_equal_policy_and_reference(name: str, divergence: str) -> None:
    smoothing = 0.1 if name in ("cdpo", "robust", "exo_pair") else 0.0
    loss = DpoLoss(loss_type=name, label_smoothing=smoothing, f_divergence_type=divergence)
    value, _ = loss(one_token_pairs(PI_W, PI_L, PI_W, PI_L), TOTALS)
    assert value.item() == pytest.approx(loss.start_value(), rel=1e-5)


def test_the_start_value_of_sigmoid_is_ln_2() -> None:
    assert DpoLoss().start_value() == pytest.approx(0.693147, abs=1e-6)


def test_a_first_step_away_from_ln_2_is_refused() -> None:
    DpoLoss().check_start({"loss": 0.693150}, tolerance=1e-4)
    with pytest.raises(InvariantViolation, match=r"0\.693147"):
        DpoLoss().check_start({"loss": 0.70}, tolerance=1e-4)
    with pytest.raises(InvariantViolation):
        DpoLoss().check_start({"loss": float("nan")}, tolerance=1e-4)


def test_rewards_are_beta_log_ratios_and_accuracy_counts_strictly_greater() -> None:
    _, metrics = DpoLoss(beta=0.1)(FIXTURE, TOTALS)
    means = {name: float(total) / weight for name, (total, weight) in metrics.items()}
    assert means["rewards/chosen"] == pytest.approx(0.1 * (0 + 0.1 - 0.9) / 3)
    assert means["rewards/rejected"] == pytest.approx(0.1 * (0 - 9.9 - 20.9) / 3)
    assert means["rewards/accuracies"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "no effect"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "works with"),
        ({"loss_type": "aot", "use_weighting": True}, "single pairs"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DpoLoss(**options)


def test_ld_alpha_scales_the_tokens_beyond_the_shared_length() -> None:
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    zeros = torch.zeros(5)
    view = TokenView(logps, torch.tensor([0, 0, 0, 1, 1]), 2, zeros, zeros.bool(), zeros, zeros, {}, 2)
    assert sequence_logps(view, 0.5).tolist() == [-5.0, -24.0]
    assert sequence_logps(view, None).tolist() == [-7.0, -24.0]
    batch = Batch.from_sequences(
        [[0, 1, 2, 3], [0, 1, 2]], [[False, True, True, True], [False, True, True]], 2
    )
    assert np.array_equal(ld_weights(batch, 0.5), [1, 1, 0.5, 1, 1])

"""KL estimators by value and by gradient, and the coefficient's controller."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.algorithms.kl import KL_ESTIMATORS, KlController, KlEstimator, kl_values
from actors.algorithms.policy_losses import PolicySettings, ppo_clip

LOG_P, LOG_Q = [-1.0, -2.0], [-1.5, -1.0]


@pytest.mark.parametrize(
    ("name", "expected"), [("k1", [0.5, -1]), ("k2", [0.125, 0.5]), ("k3", [0.106531, 0.718282])]
)
def test_estimators_have_the_literal_values(name: KlEstimator, expected: list[float]) -> None:
    assert kl_values(name, np.array(LOG_P), np.array(LOG_Q)) == pytest.approx(expected, abs=1e-6)


def expected_gradient(name: str, theta: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Gradient of an estimator as a loss term, in expectation over p, by the logits of p (exact sum)."""
    logits = theta.clone().requires_grad_()
    log_p = logits.log_softmax(0)
    value = (log_p.detach().exp() * KL_ESTIMATORS[name](log_p - log_q)).sum()
    return torch.autograd.grad(value, logits)[0]


def test_in_a_loss_k1_pulls_nowhere_k2_down_the_kl_and_k3_down_the_other_kl() -> None:
    theta = torch.tensor([0.3, -0.2, 1.1, 0.0], dtype=torch.float64)
    log_q = torch.tensor([1.0, 0.1, -0.4, 0.2], dtype=torch.float64).log_softmax(0)
    logits = theta.clone().requires_grad_()
    log_p = logits.log_softmax(0)
    kl_p_q = (log_p.exp() * (log_p - log_q)).sum()
    kl_q_p = (log_q.exp() * (log_q - log_p)).sum()
    of_kl_p_q = torch.autograd.grad(kl_p_q, logits, retain_graph=True)[0]
    of_kl_q_p = torch.autograd.grad(kl_q_p, logits)[0]
    assert expected_gradient("k1", theta, log_q).abs().max() < 1e-12
    assert (expected_gradient("k2", theta, log_q) - of_kl_p_q).abs().max() < 1e-12
    assert (expected_gradient("k3", theta, log_q) - of_kl_q_p).abs().max() < 1e-12
    assert (of_kl_p_q - of_kl_q_p).abs().max() > 0.01


def test_as_a_reward_of_the_policy_gradient_k1_pulls_down_the_kl() -> None:
    """Distillation: E_p[-(log q - log p) grad log p] is the gradient of KL(p || q), as an exact sum."""
    logits = torch.tensor([0.3, -0.2, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([1.0, 0.1, -0.4, 0.2], dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    advantages = -KL_ESTIMATORS["k1"](log_p.detach() - log_q)
    surrogate = ppo_clip((log_p - log_p.detach()).exp(), log_p, advantages, PolicySettings()).loss
    by_samples = torch.autograd.grad((log_p.detach().exp() * surrogate).sum(), logits, retain_graph=True)[0]
    exact = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits)[0]
    assert (by_samples - exact).abs().max() < 1e-12


def test_estimators_agree_in_expectation_where_the_formulas_say_so() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.45, 0.35, 0.2], dtype=torch.float64)
    d = p.log() - q.log()
    kl = (p * d).sum()
    assert (p * KL_ESTIMATORS["k3"](d)).sum().item() == pytest.approx(kl.item(), abs=1e-12)
    assert (p * KL_ESTIMATORS["k2"](d)).sum().item() == pytest.approx(kl.item(), rel=0.05)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1 + 0.0), (6.6, 1 + 0.1 * 0.064), (60.0, 1 + 0.2 * 0.064), (0.0, 1 - 0.2 * 0.064)],
)
def test_the_controller_moves_beta_by_the_clipped_error(kl: float, factor: float) -> None:
    controller = KlController(beta=0.1, target=6.0, horizon=1000)
    assert controller.updated(kl, 64).beta == pytest.approx(0.1 * factor, rel=1e-12)


def test_without_a_target_beta_stays() -> None:
    controller = KlController(beta=0.1)
    assert controller.updated(50.0, 64) is controller

"""Figures known before a stage starts are compared with its first step."""

from __future__ import annotations

import pytest

from actors.algorithms.dpo import DpoLoss
from actors.errors import InvariantViolation
from pipeline.stages.checks import check_first_step, check_unmoved

AT_ZERO = {"rewards/chosen": 0.0, "rewards/rejected": 0.0}


def test_a_policy_that_is_its_reference_passes() -> None:
    metrics = {"loss": 0.693148, "rewards/chosen": 1e-7, "rewards/rejected": -1e-7}
    check_first_step("dpo", DpoLoss(), metrics, "float32")


def test_the_auxiliary_loss_is_part_of_the_first_loss() -> None:
    check_first_step("dpo", DpoLoss(), AT_ZERO | {"loss": 0.695147, "aux_loss_term": 0.002}, "float32")


def test_a_reference_that_is_another_model_is_caught_by_the_loss() -> None:
    with pytest.raises(InvariantViolation, match=r"loss is 0\.71.*equal policy and reference give 0\.693147"):
        check_first_step("dpo", DpoLoss(), AT_ZERO | {"loss": 0.7131}, "float32")


@pytest.mark.parametrize("reward", [0.02, float("nan")])
def test_a_reference_that_is_another_model_is_caught_by_the_rewards(reward: float) -> None:
    metrics = AT_ZERO | {"loss": 0.693147, "rewards/chosen": reward}
    with pytest.raises(InvariantViolation, match="rewards/chosen is"):
        check_first_step("dpo", DpoLoss(), metrics, "float32")


def test_frozen_parameters_that_moved_are_caught() -> None:
    check_unmoved("sft", "abc", "abc")
    with pytest.raises(InvariantViolation, match="frozen parameters changed"):
        check_unmoved("sft", "abc", "abd")

"""What is known before a stage starts is held against what it does first."""

from __future__ import annotations

import math

import pytest

from actors.errors import InvariantViolation
from pipeline.stages.checks import check_first_dpo_step, check_unmoved, first_dpo_loss
from pipeline.stages.spec import DpoStage


def stage(**keys: object) -> DpoStage:
    return DpoStage(data=["x"], **keys)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        ("sigmoid", 0.693147),
        ("hinge", 1.0),
        ("ipo", 25.0),
        ("nca_pair", 1.386294),
        ("bco_pair", 1.386294),
        ("sppo_hard", 50.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", 0.846574),
        ("aot", 0.693147),
    ],
)
def test_each_loss_has_its_own_start_value(loss: str, value: float) -> None:
    assert first_dpo_loss(stage(loss_type=loss)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("loss", ["cdpo", "robust"])
def test_smoothed_losses_start_at_ln_2(loss: str) -> None:
    assert first_dpo_loss(stage(loss_type=loss, label_smoothing=0.1)) == pytest.approx(math.log(2))


def test_a_loss_with_an_sft_term_has_no_known_start() -> None:
    assert first_dpo_loss(stage(loss_type=["sigmoid", "sft"])) is None


def test_a_policy_that_is_its_reference_passes() -> None:
    check_first_dpo_step("dpo", stage(), {"loss": 0.693148, "rewards/chosen": 1e-7}, "float32", 0.0)


def test_the_auxiliary_loss_is_part_of_the_first_loss() -> None:
    check_first_dpo_step("dpo", stage(), {"loss": 0.693147 + 0.002, "aux_loss": 2.0}, "float32", 0.001)


def test_a_reference_that_is_another_model_is_caught_by_the_loss() -> None:
    with pytest.raises(InvariantViolation, match=r"loss is 0\.71.*must start at 0\.693147"):
        check_first_dpo_step("dpo", stage(), {"loss": 0.7131}, "float32", 0.0)


def test_a_reference_that_is_another_model_is_caught_by_the_rewards() -> None:
    with pytest.raises(InvariantViolation, match="rewards/chosen is 0.02"):
        check_first_dpo_step(
            "dpo", stage(loss_type=["sigmoid", "sft"]), {"loss": 1.0, "rewards/chosen": 0.02}, "float32", 0.0
        )


def test_frozen_parameters_that_moved_are_caught() -> None:
    check_unmoved("sft", "abc", "abc")
    with pytest.raises(InvariantViolation, match="frozen parameters changed"):
        check_unmoved("sft", "abc", "abd")

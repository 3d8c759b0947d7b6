"""Run-time checks of the online stage: each passes on what is right and names what is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from actors.algorithms.advantages import group_relative
from actors.algorithms.checks import (
    BEYOND_2X_TOLERANCE,
    IDLE_LIMIT,
    MISMATCH_TOLERANCE,
    Idle,
    check_finite,
    check_first_kl,
    check_first_ratio,
    check_mismatch,
    divergence,
    idle_reason,
    load_distance,
    mismatch_metrics,
)
from actors.errors import InvariantViolation


@pytest.mark.parametrize("share", ["ratio/beyond", "ratio/beyond_tenth"])
def test_ratios_away_from_1_at_the_first_update_stop_the_run(share: str) -> None:
    well = {"ratio/beyond": 0.02, "ratio/beyond_tenth": 0.5}
    check_first_ratio(well, 1e-3)
    for wrong in (0.51, math.nan):
        with pytest.raises(InvariantViolation, match="of other weights, tokens or another temperature"):
            check_first_ratio({**well, share: wrong}, 1e-3)


def test_a_reference_that_is_not_the_start_stops_the_run() -> None:
    logps = np.array([-1.0, -2.0])
    check_first_kl(logps, logps, 1e-5)
    with pytest.raises(InvariantViolation, match=r"0\.412 nats per token apart"):
        check_first_kl(logps, np.array([-1.5, -1.0]), 1e-5)


def test_divergence_has_the_literal_values() -> None:
    found = divergence(np.array([-1.0, -2.0]), np.array([-1.5, -1.0]))
    assert found == pytest.approx({"k1": -0.25, "k3": 0.4124065, "max": 1.0, "beyond_2x": 0.5}, abs=1e-6)
    assert divergence(np.zeros(0), np.zeros(0)) == {"k1": 0.0, "k3": 0.0, "max": 0.0, "beyond_2x": 0.0}


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 5e-7), ("bfloat16", 0.02)])
def test_noise_of_the_dtype_and_single_route_flips_pass(dtype: str, noise: float) -> None:
    generator = np.random.default_rng(0)
    trainer = -generator.exponential(1.0, size=5000)
    engine = trainer + generator.normal(0, noise, size=5000)
    engine[7] += 0.4
    metrics = mismatch_metrics(engine, trainer)
    assert set(metrics) == {"mismatch/k1", "mismatch/k3", "mismatch/max", "mismatch/beyond_2x"}
    check_mismatch(metrics, MISMATCH_TOLERANCE[dtype], BEYOND_2X_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_with_other_weights_stops_the_run_with_the_figures(dtype: str) -> None:
    generator = np.random.default_rng(0)
    trainer = -generator.exponential(1.0, size=5000)
    metrics = mismatch_metrics(trainer + generator.normal(0, 0.5, size=5000), trainer)
    with pytest.raises(InvariantViolation, match=r"disagree.*k3 0\.1.*factor of 2") as raised:
        check_mismatch(metrics, MISMATCH_TOLERANCE[dtype], BEYOND_2X_TOLERANCE[dtype])
    assert raised.value.who == "rollout"


def test_a_few_tokens_far_apart_stop_the_run_even_where_the_mean_hides_them() -> None:
    metrics = {"mismatch/k1": 0.0, "mismatch/k3": 1e-5, "mismatch/max": 1.0, "mismatch/beyond_2x": 0.01}
    with pytest.raises(InvariantViolation, match=r"1\.00% of tokens beyond"):
        check_mismatch(metrics, MISMATCH_TOLERANCE["float32"], BEYOND_2X_TOLERANCE["float32"])


def test_a_mismatch_that_is_not_a_number_stops_the_run() -> None:
    with pytest.raises(InvariantViolation):
        check_mismatch(mismatch_metrics(np.array([math.nan]), np.zeros(1)), 1e-4, 0.005)


def test_values_that_are_not_finite_are_named_with_their_place() -> None:
    check_finite(advantages=np.ones(3), values=None)
    with pytest.raises(
        InvariantViolation, match="1 of 3 values are not finite; the first is nan at 2"
    ) as raised:
        check_finite(advantages=np.ones(3), returns=np.array([0.0, 1.0, math.nan]))
    assert raised.value.phase == "returns"


def test_steps_without_any_advantage_stop_the_run_only_in_a_row() -> None:
    idle = Idle()
    for _ in range(IDLE_LIMIT - 1):
        idle = idle.after(np.zeros(4))
    assert idle.after(np.array([0.0, 1e-9])) == Idle(0)
    with pytest.raises(InvariantViolation, match="all advantages were 0"):
        idle.after(np.zeros(4))


NAN, CUT, FINISHED = math.nan, np.zeros(4, bool), np.ones(4, bool)
IDLE_STEPS = {
    "equal rewards whose mean rounds": (np.full(4, 1e-13), np.full(4, 0.1), FINISHED, "get the same reward"),
    "equal rewards of 0": (np.zeros(4), np.zeros(4), FINISHED, "get the same reward"),
    "all cut and masked": (np.zeros(0), np.arange(4.0), CUT, "every sample was cut"),
    "nobody scored": (np.zeros(4), np.full(4, NAN), FINISHED, "no sample had a reward"),
    "each cut or passed over": (np.zeros(2), np.array([1, 0, NAN, NAN]), np.arange(4) > 1, "each was cut"),
    "no pair of equal rewards": (np.zeros(0), np.ones(4), None, "get the same reward"),
    "no pair that anybody scored": (np.zeros(0), np.full(4, NAN), None, "no sample had a reward"),
}


def idle_steps(before: Idle, steps: int, *of_each: np.ndarray | None) -> Idle:
    idle = before
    for _ in range(steps):
        idle = idle.after(*of_each)  # type: ignore[arg-type]
    return idle


@pytest.mark.parametrize("what", IDLE_STEPS)
def test_steps_that_teach_nothing_end_with_the_reason_that_holds(what: str) -> None:
    *of_each, says = IDLE_STEPS[what]
    idle = idle_steps(Idle(), IDLE_LIMIT - 1, *of_each)
    with pytest.raises(InvariantViolation, match=says) as raised:
        idle.after(*of_each)
    assert ("same reward" in str(raised.value)) == ("same reward" in says)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e15])
def test_rewards_of_any_size_that_differ_are_a_signal(size: float) -> None:
    """Advantages in units of the reward, and divided by its deviation."""
    rewards = size * np.array([0.0, 1.0])
    for signal in (rewards - rewards.mean(), group_relative(rewards, 2, "group")):
        assert idle_reason(signal, rewards, FINISHED[:2]) is None


def test_several_reasons_are_told_with_their_steps() -> None:
    idle = idle_steps(Idle(), 3, np.zeros(0), np.zeros(4), CUT)
    idle = idle_steps(idle, 6, np.zeros(4), np.zeros(4), FINISHED)
    with pytest.raises(InvariantViolation, match=r"in 7 of them all samples.*; in 3 of them every sample"):
        idle.after(np.zeros(4), np.zeros(4), FINISHED)


def test_without_rewards_only_equal_ones_are_not_blamed() -> None:
    with pytest.raises(InvariantViolation, match="no sample counted"):
        Idle(IDLE_LIMIT - 1).after(np.zeros(0))


def test_load_distance_is_that_of_the_worst_layer() -> None:
    even = np.array([[10, 10], [10, 10]])
    assert load_distance(even, 7 * even) == 0.0
    assert load_distance(even, np.array([[10, 10], [0, 20]])) == 0.5
    assert load_distance(np.zeros((2, 2)), np.zeros((2, 2))) == 0.0

"""Proof that weights arrived: which differences count."""

from __future__ import annotations

import numpy as np
import pytest

from actors.sync.protocol import Expected, Readback
from actors.sync.verify import (
    compare_probes,
    mismatch_in_probes,
    mismatch_in_readback,
    nearness,
)

GENERATOR = np.random.default_rng(0)
TRAINER = [GENERATOR.normal(-2, 1, 32) for _ in range(4)]


def moved(values: list[np.ndarray], size: float, seed: int = 1) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [v + size * generator.normal(0, 1, len(v)) for v in values]


# --- Read back ------------------------------------------------------------------------------------


EXPECTED = Expected({"a": "1", "b": "2"}, None)


def test_a_readback_may_hold_more_than_expected_but_nothing_else() -> None:
    assert mismatch_in_readback(EXPECTED, Readback.of(4, {"a": "1", "b": "2", "c": "3"}), 4) is None
    assert "1 of 2 tensors in the engine differ" in str(
        mismatch_in_readback(EXPECTED, Readback.of(4, {"a": "1", "b": "3"}), 4)
    )
    assert "1 tensors are not bound in the engine, the first: b" in str(
        mismatch_in_readback(EXPECTED, Readback.of(4, {"a": "1"}), 4)
    )
    assert "version 3, not 4" in str(mismatch_in_readback(EXPECTED, Readback.of(3, EXPECTED.digests), 4))


def test_swapped_tensors_have_each_others_digest_and_are_seen() -> None:
    wrong = mismatch_in_readback(EXPECTED, Readback.of(4, {"a": "2", "b": "1"}), 4)
    assert wrong is not None
    assert "2 of 2 tensors" in wrong


def test_an_engine_sends_the_list_of_digests_only_where_they_are_not_those_that_are_known() -> None:
    same = Readback.of(4, {"b": "2", "a": "1"}, EXPECTED.digest)
    assert same.digests == {}
    assert mismatch_in_readback(EXPECTED, same, 4) is None
    other = Readback.of(4, {"a": "1", "b": "3"}, EXPECTED.digest)
    assert other.digests == {"a": "1", "b": "3"}
    # One that says neither is no proof.
    assert "2 tensors are not bound" in str(mismatch_in_readback(EXPECTED, Readback(4, "another"), 4))


def test_digests_of_another_algorithm_are_told_apart_from_other_weights() -> None:
    found = Readback(4, EXPECTED.digest, "sums", EXPECTED.digests)
    assert mismatch_in_readback(EXPECTED, found, 4) == (
        "read back digests by sums, the trainer's are by xxh3"
    )


def test_noise_of_the_dtype_is_within_tolerance() -> None:
    fine = compare_probes(moved(TRAINER, 5e-7), TRAINER)
    assert mismatch_in_probes(fine, "float32") is None
    rough = compare_probes(moved(TRAINER, 5e-3), TRAINER)
    assert mismatch_in_probes(rough, "bfloat16") is None
    assert "probes beyond 0.0001" in str(mismatch_in_probes(rough, "float32"))
    assert mismatch_in_probes(rough, "float32", tolerance=0.1) is None


def test_rounding_errors_are_judged_relative_to_the_log_probability() -> None:
    unlikely = [v - 20 for v in TRAINER]
    noisy = moved(unlikely, 0.3)
    assert mismatch_in_probes(compare_probes(noisy, unlikely), "bfloat16") is None
    likely = [v / 1e3 for v in TRAINER]
    assert mismatch_in_probes(compare_probes(moved(likely, 0.3), likely), "bfloat16") is not None


def test_a_flipped_route_of_a_single_token_is_no_fault() -> None:
    engine = moved(TRAINER, 5e-7)
    engine[2][7] += 1.9e-2
    report = compare_probes(engine, TRAINER)
    assert report.max == pytest.approx(1.9e-2, rel=1e-3)
    assert report.worst_probe == 2
    assert mismatch_in_probes(report, "float32") is None


def test_experts_that_were_not_repacked_are_beyond_tolerance_in_both_dtypes() -> None:
    report = compare_probes(moved(TRAINER, 4), TRAINER)
    assert mismatch_in_probes(report, "float32") is not None
    assert mismatch_in_probes(report, "bfloat16") is not None


def test_an_old_version_is_seen_far_below_the_tolerance() -> None:
    before = moved(TRAINER, 5e-6, seed=2)  # as a step at learning rate 1e-6 moves them
    report = compare_probes(moved(before, 5e-7), TRAINER, previous=before)
    assert report.relative_p90 < 1e-4
    assert report.arrived == pytest.approx(0, abs=0.1)
    assert "nearer to the previous version" in str(mismatch_in_probes(report, "float32"))
    arrived = compare_probes(moved(TRAINER, 5e-7), TRAINER, previous=before)
    assert arrived.arrived == pytest.approx(1, abs=0.1)
    assert mismatch_in_probes(arrived, "float32") is None


def test_the_base_in_place_of_the_policy_is_seen() -> None:
    base = moved(TRAINER, 1e-5, seed=3)
    report = compare_probes(moved(base, 5e-7), TRAINER, base=base)
    assert "nearer to the base" in str(mismatch_in_probes(report, "float32"))


def test_nearness_does_not_judge_what_noise_hides() -> None:
    before = moved(TRAINER, 5e-6, seed=2)  # against noise of .005, as in bfloat16
    report = compare_probes(moved(TRAINER, 5e-3), TRAINER, previous=before)
    assert report.arrived is None
    assert nearness(TRAINER[0], TRAINER[0], TRAINER[0]) is None


def test_a_value_that_is_no_number_is_beyond_every_tolerance() -> None:
    engine = [np.full_like(v, np.nan) for v in TRAINER]
    assert mismatch_in_probes(compare_probes(engine, TRAINER), "bfloat16", tolerance=1e9) is not None


def test_probes_have_to_be_scored_token_by_token() -> None:
    with pytest.raises(ValueError, match="were scored as"):
        compare_probes([v[1:] for v in TRAINER], TRAINER)


def test_a_policy_that_starts_as_the_base_is_not_held_against_it() -> None:
    """The engine repeats its own base to the bit; the trainer's differs from it by kernels only."""
    engine = moved(TRAINER, 3e-7)
    report = compare_probes(engine, TRAINER, base=TRAINER)
    assert report.left_base is None
    assert mismatch_in_probes(report, "float32") is None
    unmoved = compare_probes(engine, moved(TRAINER, 5e-6, seed=2), base=TRAINER)
    assert unmoved.left_base == pytest.approx(0, abs=0.1)
    assert "nearer to the base" in str(mismatch_in_probes(unmoved, "float32"))


def test_updates_that_rounding_leaves_out_are_reported_and_not_judged() -> None:
    unmoved = compare_probes(TRAINER, moved(TRAINER, 1e-2, seed=2), base=TRAINER)
    assert unmoved.left_base == pytest.approx(0, abs=0.1)
    assert "nearer to the base" in str(mismatch_in_probes(unmoved, "bfloat16", unchanged=0.1))
    assert mismatch_in_probes(unmoved, "bfloat16", unchanged=0.95) is None
    assert mismatch_in_probes(unmoved, "float32", tolerance=0.2, unchanged=0.95) is not None

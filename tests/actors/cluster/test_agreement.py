"""Proofs that ranks have one result: what makes two values the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.cluster.agreement import Answer, agreed, proof_of
from actors.errors import InvariantViolation

VALUE = {
    "loss": 0.5,
    "nan": float("nan"),
    "logps": np.linspace(-9.0, -1.0, 1000),
    "digest": "d",
    "n": [1, None],
}


def other(**changed: Any) -> dict[str, Any]:
    return {**VALUE, **changed}


def swapped(first: int, second: int) -> np.ndarray:
    logps = VALUE["logps"].copy()
    logps[[first, second]] = logps[[second, first]]
    return logps


def test_equal_values_have_equal_proofs_wherever_they_are_made() -> None:
    copy = other(logps=VALUE["logps"].copy())
    assert proof_of(VALUE).same(proof_of(copy))
    assert len(proof_of(np.zeros(10**6), exact=False).sums) == 3


@pytest.mark.parametrize(
    "value",
    [
        other(loss=np.nextafter(0.5, 1)),
        other(logps=VALUE["logps"].astype(np.float32)),
        other(logps=swapped(0, 1)),
        other(digest="e"),
        other(n=[1, 0]),
        {key: VALUE[key] for key in reversed(VALUE)},
        list(VALUE.values()),
        None,
    ],
)
def test_another_bit_key_order_or_type_is_another_value(value: Any) -> None:
    assert not proof_of(VALUE).same(proof_of(value))


def test_keys_of_each_ranks_own_are_left_out() -> None:
    one, two = (proof_of(other(seconds=seconds), own=("seconds",)) for seconds in (1.0, 2.0))
    assert one.same(two)
    assert not proof_of(other(seconds=1.0)).same(proof_of(other(seconds=2.0)))


def test_ranks_of_the_same_rows_may_differ_by_rounding_and_by_nothing_else() -> None:
    noise = 1e-6 * np.random.default_rng(0).normal(size=1000)
    near = other(loss=0.5 + 1e-7, logps=VALUE["logps"] + noise)
    right = proof_of(VALUE, exact=False)
    assert right.same(proof_of(near, exact=False))
    assert not proof_of(VALUE).same(proof_of(near))
    for wrong in (
        other(loss=0.6),
        other(nan=0.0),
        other(logps=swapped(0, 999)),
        other(logps=-VALUE["logps"]),
        other(digest="e"),
        other(logps=VALUE["logps"][:-1]),
    ):
        assert not right.same(proof_of(wrong, exact=False))


def test_whoever_differs_from_the_first_is_named() -> None:
    answers = [Answer(proof_of(value), value) for value in (1.0, 1.0, 2.0, 3.0)]
    with pytest.raises(
        InvariantViolation, match="policy-2, policy-3: another result of this call than policy-0"
    ):
        agreed(answers, [f"policy-{rank}" for rank in range(4)], "update")
    assert agreed(answers[:2], ["policy-0", "policy-1"], "update") == 1.0


def test_what_is_made_of_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match="can't agree on a set"):
        proof_of({"names": {"a"}})

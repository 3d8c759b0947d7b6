"""Online DPO's updates in a real host: those of offline DPO on the same pairs, and steps without a pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.algorithms.dpo import DpoLoss, OnlineDpoLoss
from actors.trainer.spec import OptimSpec
from tests.actors.trainer.host_cases import pair_batch, policy_host, random_pairs, with_reference

OPTIM = OptimSpec(learning_rate=1e-2, lr_scheduler_type="constant")


def test_on_the_same_pairs_it_is_offline_dpo(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    batch = with_reference(host, pair_batch(random_pairs(5)))
    curves = []
    for loss in (DpoLoss(beta=0.3), OnlineDpoLoss(beta=0.3)):
        host.add_adapter(loss.__class__.__name__)
        host.updates.prepare_training(loss.__class__.__name__, OPTIM, 3)
        curves.append([host.updates.update(batch, loss, step)["loss"] for step in range(3)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0][2] < curves[0][0] == pytest.approx(0.693147, rel=1e-5)


def test_a_step_without_a_pair_has_no_gradient_and_goes_on(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    batch = with_reference(host, pair_batch(random_pairs(2)))
    host.updates.prepare_training("policy", OPTIM, 3)
    loss = OnlineDpoLoss()
    nothing = host.updates.update(batch.select([]), loss, 0)
    assert (nothing["loss"], nothing["grad_norm"], nothing["pairs"]) == (0.0, 0.0, 0.0)
    assert "rewards/accuracies" not in nothing
    loss.check_start(nothing, 1e-4)
    something = host.updates.update(batch, loss, 1)
    assert (something["pairs"], something["loss"]) == (2.0, pytest.approx(0.693147, rel=1e-5))
    loss.check_start(something, 1e-4)


def test_at_a_temperature_policy_and_reference_are_both_divided_by_it(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    pairs = pair_batch(random_pairs(3))
    tokens = host.scores.token_logprobs(pairs, None, 0.5)
    ref = [float(part.sum()) for part in _split(tokens, pairs.label_counts.tolist())]
    batch = pairs.with_columns(ref_chosen_logps=np.array(ref[0::2]), ref_rejected_logps=np.array(ref[1::2]))
    host.updates.prepare_training("policy", OPTIM, 1)
    assert host.updates.update(batch, OnlineDpoLoss(temperature=0.5), 0)["loss"] == pytest.approx(
        0.693147, rel=1e-5
    )


def _split(values: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1])

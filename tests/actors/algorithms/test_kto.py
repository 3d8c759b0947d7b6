"""KTO by literals: the reference point, both halves of the loss, weights, and what is left out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.algorithms.kto import KtoLoss, sequences
from actors.algorithms.loss import TokenView
from actors.batches.batch import Batch


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def view_of(logps: list[float], label: list[bool], ref: list[float]) -> TokenView:
    """Rows of one token each."""
    n = len(logps)
    zeros = torch.zeros(n)
    columns = {"label": torch.tensor(label), "ref_logps": torch.tensor(ref, dtype=torch.float64)}
    logs = torch.tensor(logps, requires_grad=True)
    return TokenView(logs, torch.arange(n), n, zeros, zeros.bool(), zeros, zeros, columns)


def batch_of(label: list[bool], kl: list[float]) -> Batch:
    ids = [np.array([1, 2]) for _ in label]
    columns = {"label": np.array(label), "ref_logps": np.zeros(len(label))}
    columns |= {"kl_logps": np.array(kl), "ref_kl_logps": np.zeros(len(label))}
    return Batch.from_sequences(ids, [np.array([False, True])] * len(label), 1, columns)


LABEL, LOGPS, REF = [True, False, True], [-1.0, -2.0, -3.0], [-1.5, -1.0, -3.0]


def test_a_desirable_row_is_held_above_the_reference_point_and_another_below_it() -> None:
    """Log-ratios .5, -1, 0; z = mean(.2, .4, .6) = .4; beta 2."""
    loss = KtoLoss(beta=2.0)
    totals = loss.totals(batch_of(LABEL, [0.2, 0.4, 0.6]))
    assert totals == pytest.approx({"rows": 3.0, "chosen": 2.0, "rejected": 1.0, "kl": 0.4})
    found, metrics = loss(view_of(LOGPS, LABEL, REF), totals)
    expected = (1 - sigmoid(0.2)) + (1 - sigmoid(2.8)) + (1 - sigmoid(-0.8))
    assert found.item() == pytest.approx(expected / 3)
    means = {
        name: float(total / weight) if weight else float(total) for name, (total, weight) in metrics.items()
    }
    assert means["kl"] == pytest.approx(0.4)
    assert (means["rewards/chosen"], means["rewards/rejected"]) == pytest.approx((0.5, -2.0))
    assert means["rewards/margins"] == pytest.approx(2.5)
    assert means["logps/chosen"] == pytest.approx(-2.0)


def test_a_negative_estimate_of_the_divergence_is_0() -> None:
    assert KtoLoss().totals(batch_of(LABEL, [-1.0, 0.1, 0.2]))["kl"] == 0.0


def test_weights_scale_their_own_rows_and_the_mean_is_over_all() -> None:
    loss = KtoLoss(beta=1.0, desirable_weight=3.0, undesirable_weight=0.5)
    found, _ = loss(view_of(REF, LABEL, REF), loss.totals(batch_of(LABEL, [0.0] * 3)))
    assert found.item() == pytest.approx((3 + 3 + 0.5) * 0.5 / 3)


def test_apo_zero_unpaired_has_no_reference_point() -> None:
    loss = KtoLoss(loss_type="apo_zero_unpaired", beta=1.0)
    assert loss.required_columns == ("label", "ref_logps")
    totals = loss.totals(batch_of(LABEL, [9.0] * 3))
    found, _ = loss(view_of(LOGPS, LABEL, REF), totals)
    assert found.item() == pytest.approx(((1 - sigmoid(0.5)) + sigmoid(-1.0) + 0.5) / 3)


def test_a_batch_without_undesirable_rows_has_no_metric_of_theirs() -> None:
    loss = KtoLoss()
    _, metrics = loss(view_of([-1.0], [True], [-1.0]), loss.totals(batch_of([True], [0.0])))
    assert not any(name.endswith(("rejected", "margins")) for name in metrics)


def test_micro_batches_of_rows_add_up() -> None:
    loss = KtoLoss(beta=0.7)
    totals = loss.totals(batch_of(LABEL, [0.3, 0.1, 0.5]))
    whole, metrics = loss(view_of(LOGPS, LABEL, REF), totals)
    parts = [loss(view_of(LOGPS[i : i + 1], LABEL[i : i + 1], REF[i : i + 1]), totals) for i in range(3)]
    assert sum(value.item() for value, _ in parts) == pytest.approx(whole.item())
    for name in ("kl", "rewards/margins"):
        assert sum(float(part[name][0]) for _, part in parts) == pytest.approx(float(metrics[name][0]))


def test_the_mismatched_rows_are_asked_about_and_then_gone() -> None:
    ids = [np.array(x) for x in ([1, 2, 3], [1, 9], [4, 5], [4, 6, 7])]
    masks = [np.arange(len(x)) > 0 for x in ids]
    columns = {"label": np.array([True, False]), "ref_logps": np.zeros(2), "ref_kl_logps": np.zeros(2)}
    pairs = Batch.from_sequences(ids, masks, 2, columns)
    asked: list[Batch] = []

    def logprobs(batch: Batch) -> np.ndarray:
        asked.append(batch)
        return np.array([0.5, 1.5])

    found = KtoLoss().completed(pairs, logprobs)
    assert asked[0].token_ids.tolist() == [1, 9, 4, 6, 7]
    assert found.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert found.columns["kl_logps"].tolist() == [0.5, 1.5]
    assert KtoLoss().completed(found, logprobs) is found
    single = replace(sequences(pairs, 0), columns={})
    assert KtoLoss(loss_type="apo_zero_unpaired").completed(single, logprobs) is single

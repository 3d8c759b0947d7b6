"""A teacher's most probable tokens on a rank: found alike by blocks and whole, and learnt from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.algorithms import TOP_IDS, TOP_LOGPS, DistillLoss
from actors.batches.batch import Batch
from actors.trainer import token_scorer
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import OptimSpec
from tests.actors.trainer.host_cases import policy_host, random_rows, sft_batch

K = 5


@pytest.fixture(params=["whole", "by blocks"])
def host(request: pytest.FixtureRequest, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> ModelHost:
    if request.param == "by blocks":
        monkeypatch.setattr(token_scorer, "block_elements", lambda device: 1)
    return policy_host(tiny_base)


def taught(host: ModelHost, batch: Batch, temperature: float) -> Batch:
    """With the bare base as teacher; sharper than the policy where its temperature is below 1."""
    ids, logps = np.split(host.scores.top_logprobs(batch, None, K, temperature), 2, axis=1)
    old = host.scores.token_logprobs(batch, "policy")
    columns = {TOP_IDS: ids.astype(np.int64), TOP_LOGPS: logps, "mask": np.ones(len(old), bool)}
    return batch.with_token_columns(**columns, old_logps=old)


def test_a_policy_that_is_its_teacher_has_nothing_to_learn_and_another_learns(host: ModelHost) -> None:
    batch = sft_batch(random_rows(6))
    own = taught(host, batch, 1.0)
    labels = batch.token_ids[batch.loss_mask]
    found, place = np.nonzero(own.token_columns[TOP_IDS] == labels[:, None])
    assert own.token_columns[TOP_LOGPS][found, place] == pytest.approx(
        own.token_columns["old_logps"][found], abs=1e-5
    )
    assert (np.diff(own.token_columns[TOP_LOGPS], axis=1) <= 0).all()
    for beta in (0.0, 0.5, 1.0):
        assert abs(host.updates.evaluate(own, DistillLoss(beta=beta), "policy")["loss"]) < 1e-6
    sharper, loss = taught(host, batch, 0.2), DistillLoss(beta=0.0)
    host.updates.prepare_training("policy", OptimSpec(learning_rate=2e-2), 30)
    first, *_, last = [host.updates.update(sharper, loss, step, "policy")["loss"] for step in range(30)]
    assert first > 0.05
    assert last < 0.7 * first

"""Weights that are parked while an engine has the device: out of reach, and back to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.algorithms.sft import SftLoss
from actors.cluster.turn_plan import Moves
from actors.errors import InvariantViolation
from actors.models.lora.adapters import adapter_digest
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import OptimSpec
from tests.actors.trainer.host_cases import policy_host, random_rows, sft_batch

OPTIM = OptimSpec(learning_rate=2e-3)
BATCH = sft_batch(random_rows(8))


def training_host(base: Path) -> ModelHost:
    """One with a reward model's head and an optimizer that has stepped."""
    host = policy_host(base)
    host.add_adapter("reward", trainable=False)
    host.add_head("reward", "normal")
    host.updates.prepare_training("policy", OPTIM, 4)
    host.updates.update(BATCH, SftLoss(), 0)
    return host


def step(host: ModelHost, number: int) -> tuple[float, str, str]:
    loss = host.updates.update(BATCH, SftLoss(), number)["loss"]
    return loss, adapter_digest(host.state.model, "policy"), host.frozen_digest()


@pytest.mark.parametrize("moves", ["none", "optimizer", "all"])
def test_steps_go_on_as_if_nothing_had_been_parked(tiny_base: Path, moves: Moves, tmp_path: Path) -> None:
    stays, moved = training_host(tiny_base), training_host(tiny_base)
    for number in (1, 2):
        assert moved.residence.park(moves) is False
        assert moved.residence.park(moves) is False
        assert moved.residence.wake() is True
        assert moved.residence.wake() is True
        assert step(moved, number) == step(stays, number)
        # Files are written from the same memory, which numpy then looks at.
        moved.saving.save_checkpoint(str(tmp_path), "policy")
    assert np.array_equal(moved.scores.scores(BATCH, "reward"), stays.scores.scores(BATCH, "reward"))


def test_nothing_of_what_is_parked_stays_where_it_was(tiny_base: Path) -> None:
    host = training_host(tiny_base)
    everything = [*host.state.base.parameters(), *host.state.heads["reward"].parameters()]
    (bucket,) = host.updates.training.buckets
    moments = list(host.updates.training.optimizer.state[bucket.flat].values())
    host.residence.park("optimizer")
    assert all(value.isnan().all() for value in [*moments, bucket.flat.grad])
    assert not any(parameter.isnan().any() for parameter in everything)
    host.residence.wake()
    host.residence.park("all")
    assert all(parameter.isnan().all() for parameter in everything)
    assert all(buffer.isnan().all() for buffer in host.state._base.buffers())
    host.residence.wake()
    assert not any(value.isnan().any() for value in [*everything, *moments])


def test_whoever_asks_for_parked_weights_is_stopped(tiny_base: Path, tmp_path: Path) -> None:
    host = training_host(tiny_base)
    host.residence.park("none")
    for asks in (
        lambda: host.updates.update(BATCH, SftLoss(), 1),
        lambda: host.scores.token_logprobs(BATCH, "policy"),
        lambda: host.saving.save_checkpoint(str(tmp_path), "policy"),
        lambda: host.saving.save_adapter("policy", str(tmp_path)),
        lambda: host.weight_source.prepare(1, "policy", "adapter", "float32"),
        lambda: host.copy_adapter("policy", "other"),
        host.frozen_digest,
    ):
        with pytest.raises(InvariantViolation, match="never both awake"):
            asks()
    host.residence.wake()
    assert host.updates.update(BATCH, SftLoss(), 1)["loss"] > 0


def test_what_was_packed_is_there_for_engines_that_are_replaced_while_weights_are_parked(
    tiny_base: Path,
) -> None:
    host = training_host(tiny_base)
    prepared = host.weight_source.prepare(1, "policy", "adapter", "float32")
    host.residence.park("all")
    payload = host.weight_source._payload
    assert prepared is not None
    assert payload is not None
    assert payload.digest == prepared.offer.digest
    assert host.weight_source.send([]) == {}


def test_bytes_are_those_of_weights_and_of_what_trains(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    parameters = sum(p.numel() for p in host.state.base.parameters())
    found = host.residence.bytes()
    assert found.on_host
    assert 4 * parameters <= found.base < 4.1 * parameters
    assert found.optimizer == 0
    host.updates.prepare_training("policy", OPTIM, 4)
    trained = host.updates.training.n_parameters
    before = host.residence.bytes().optimizer
    host.updates.update(BATCH, SftLoss(), 0)
    # A gradient and two moments each, the latter from the first step on.
    assert 3 * 4 * trained <= before <= 3.2 * 4 * trained
    assert host.residence.bytes().optimizer == pytest.approx(before, rel=0.05)


@pytest.mark.gpu
def test_on_a_gpu_parked_memory_is_given_back(tiny_base: Path) -> None:
    host = ModelHost(policy_host(tiny_base).state.spec.model_copy(update={"device": "cuda"}))
    host.add_adapter("policy")
    host.updates.prepare_training("policy", OPTIM, 4)
    first = host.updates.update(BATCH, SftLoss(), 0)["loss"]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    host.residence.park("all")
    assert torch.cuda.memory_allocated() < before / 10
    host.residence.wake()
    assert host.updates.update(BATCH, SftLoss(), 1)["loss"] < first

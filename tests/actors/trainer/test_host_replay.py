"""A host that is given experts computes with them, however a batch is cut up; heads route for themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.algorithms.policy import PolicyLoss
from actors.batches.batch import Batch
from actors.models.spec import LoraSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import OptimSpec
from tests.actors.trainer.host_cases import host_spec, random_rows, sft_batch

LAYERS, EXPERTS, TOP_K = 2, 8, 2
LORA = LoraSpec(r=4, lora_alpha=8, targets=["attention", "experts", "router"])


def routed_batch(seed: int = 0) -> Batch:
    """Random experts for every position but the last of each sequence."""
    batch = sft_batch(random_rows(10, seed))
    drawn = np.random.default_rng(seed).permuted(
        np.tile(np.arange(EXPERTS, dtype=np.uint8), (batch.n_tokens, LAYERS, 1)), axis=2
    )
    experts = np.ascontiguousarray(drawn[..., :TOP_K])
    experts[batch.offsets[1:] - 1] = 255
    return replace(batch, experts=experts)


def replaying_host(base: Path, checkpointing: bool = False, **settings: Any) -> ModelHost:
    spec = host_spec(base, lora=LORA, **settings)
    moe = spec.model.moe.model_copy(update={"router_replay": "rollout"})
    model = spec.model.model_copy(update={"moe": moe, "gradient_checkpointing": checkpointing})
    host = ModelHost(spec.model_copy(update={"model": model}))
    host.add_adapter("policy")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in host.state.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return host


def one_by_one(host: ModelHost, batch: Batch) -> np.ndarray:
    """Log-probabilities of the counted tokens, each sequence alone with its own experts forced."""
    replay, found = host.state.runner.scorer.replay, []
    assert replay is not None
    assert batch.experts is not None
    for row in range(batch.n_rows):
        span = slice(batch.offsets[row], batch.offsets[row + 1])
        ids = torch.from_numpy(batch.token_ids[span].astype(np.int64))
        experts = batch.experts[span].astype(np.int64)
        experts[experts == 255] = -1
        replay.force(experts)
        with torch.no_grad(), host.state.as_role("policy"):
            logps = host.state.base(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        counted = np.flatnonzero(batch.loss_mask[span])
        found.append(logps[counted - 1, ids[counted]].double().numpy())
    replay.force(None)
    return np.concatenate(found)


@pytest.mark.parametrize(
    "settings",
    [{}, {"packing": False}, {"max_tokens_per_micro_batch": 60}],
    ids=["packed", "padded", "micro-batches"],
)
def test_log_probabilities_are_those_of_the_given_experts_in_any_layout(
    tiny_base: Path, settings: dict[str, Any]
) -> None:
    host, batch = replaying_host(tiny_base, **settings), routed_batch()
    expected = one_by_one(host, batch)
    np.testing.assert_allclose(host.scores.token_logprobs(batch, "policy"), expected, atol=5e-6)
    agreement = host.scores.route_agreement()
    assert agreement is not None
    # SampledBatch at random, two of eight experts are among the router's two a quarter of the time.
    assert agreement.shape == (LAYERS,)
    assert (abs(agreement - 0.25) < 0.1).all()
    assert abs(host.scores.token_logprobs(batch.unrouted(), "policy") - expected).max() > 0.1


def test_router_and_adapters_learn_the_same_with_checkpointing_and_in_micro_batches(tiny_base: Path) -> None:
    batch = routed_batch()
    steps = []
    for settings in ({}, {"checkpointing": True}, {"max_tokens_per_micro_batch": 60, "checkpointing": True}):
        host = replaying_host(tiny_base, **settings)
        host.updates.prepare_training("policy", OptimSpec(learning_rate=1e-3), 2)
        logps = host.scores.token_logprobs(batch, "policy")
        rng = np.random.default_rng(0)
        ready = batch.with_token_columns(
            old_logps=logps, advantages=rng.normal(size=len(logps)), mask=np.ones(len(logps), bool)
        ).with_columns(tokens_per_step=np.full(batch.n_rows, float(len(logps))))
        metrics = host.updates.update(ready, PolicyLoss(), 0, "policy")
        # The update computes what the log-probabilities were of: with the trainer's own routes it would not.
        assert metrics["ratio/max_deviation"] < 1e-5
        load = host.updates.router_load("policy")
        assert load is not None
        for layer in range(LAYERS):
            given = np.bincount(batch.experts[:, layer].ravel(), minlength=256)[:EXPERTS]
            assert (load[layer] >= given).all()
            assert load[layer].sum() == TOP_K * batch.n_tokens
        steps.append(
            (metrics, {n: p.detach().clone() for n, p in host.state.model.named_parameters() if "lora" in n})
        )
    (first, weights), *others = steps
    assert any("mlp.gate" in name and float(w.abs().sum()) > 0 for name, w in weights.items())
    for metrics, other in others:
        assert metrics["loss"] == pytest.approx(first["loss"], abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def test_a_head_reads_a_batch_as_the_models_own_routers_do(tiny_base: Path) -> None:
    host, batch = replaying_host(tiny_base), routed_batch()
    host.add_head("policy", "normal")
    np.testing.assert_array_equal(
        host.scores.values(batch, "policy"), host.scores.values(batch.unrouted(), "policy")
    )
    np.testing.assert_array_equal(
        host.scores.scores(batch, "policy"), host.scores.scores(batch.unrouted(), "policy")
    )


def test_a_host_that_was_not_told_to_replay_refuses_experts(tiny_base: Path) -> None:
    host = ModelHost(host_spec(tiny_base))
    with pytest.raises(ValueError, match=r"model\.moe\.router_replay"):
        host.scores.token_logprobs(routed_batch(), None)

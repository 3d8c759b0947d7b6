"""Samples of common prompts in an update: the same step as one sequence at a time, on one rank and on two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.algorithms.policy import PolicyLoss
from actors.batches.batch import Batch
from actors.trainer.model_host import ModelHost
from actors.trainer.process_groups import Ranks
from actors.trainer.spec import OptimSpec
from tests.actors.trainer.host_cases import policy_host

LOSS = PolicyLoss(loss_type="grpo", on_policy=True)


def samples() -> Batch:
    """Four prompts that begin alike, four samples of each, in turn."""
    generator = np.random.default_rng(0)
    head = generator.integers(3, 250, 6)
    prompts = [np.concatenate([head, generator.integers(3, 250, n)]) for n in (3, 9, 5, 7)]
    ids, masks = [], []
    for sample in range(16):
        prompt, answer = prompts[sample % 4], generator.integers(3, 250, generator.integers(1, 9))
        ids.append(np.concatenate([prompt, answer]))
        masks.append(np.arange(len(ids[-1])) >= len(prompt))
    batch = Batch.from_sequences(ids, masks)
    n = int(batch.loss_mask.sum())
    return batch.with_token_columns(advantages=generator.normal(size=n), engine_logps=np.full(n, -5.0))


def prepared(base: Path, **settings: bool) -> ModelHost:
    host = policy_host(base, **settings)
    host.updates.prepare_training("policy", OptimSpec(learning_rate=1e-3, optim="sgd"), 10)
    return host


def weights(host: ModelHost) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in host.updates.training.parameters.values()])


def test_samples_of_common_prompts_train_as_one_sequence_at_a_time(tiny_base: Path) -> None:
    batch, found = samples(), []
    for packing in (True, False):
        host = prepared(tiny_base, packing=packing)
        metrics = [host.updates.update(batch, LOSS, step) for step in range(2)]
        (micro,) = host.state.runner.shard(batch)[1]
        found.append((micro.n_tokens, metrics, weights(host)))
    (few, metrics, flat), (many, others, one_each) = found
    assert many == batch.n_tokens > 2 * few
    torch.testing.assert_close(flat, one_each, rtol=1e-4, atol=1e-6)
    for step, other in zip(metrics, others, strict=True):
        for name in (n for n in step if not n.endswith(("seconds", "per_second"))):
            assert step[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name


def test_two_ranks_have_whole_groups_and_the_gradient_of_one(tiny_base: Path) -> None:
    batch, host = samples(), prepared(tiny_base)
    parts = []
    for rank, shares in ((0, 1), (0, 2), (1, 2)):
        ranks = Ranks()
        ranks.share, ranks.shares = rank, shares
        runner = replace(host.state.runner, ranks=ranks)
        rows, _ = runner.shard(batch)
        groups = batch.groups()
        assert shares == 1 or {*groups[rows]}.isdisjoint(groups[np.setdiff1d(np.arange(16), rows)])
        host.updates.training.zero_grad()
        with host.state.as_role("policy"):
            runner.run(batch, LOSS, 0, train=True)
        parts.append(torch.cat([p.grad.reshape(-1) for p in host.updates.training.parameters.values()]))
    whole, first, second = parts
    assert whole.abs().max() > 0
    torch.testing.assert_close(first + second, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_an_update_that_finds_old_log_probabilities_itself_is_the_update_that_is_told_them(
    tiny_base: Path,
) -> None:
    """To the bit: a resumed run asks for them in its first step, where the other does not."""
    batch, ends, deviations = samples(), [], []
    for told, on_policy in ((True, False), (True, True), (False, True)):
        host = prepared(tiny_base)
        for step in range(2):
            columns = {"old_logps": host.scores.token_logprobs(batch, "policy")} if told else {}
            loss = LOSS.model_copy(update={"on_policy": on_policy})
            metrics = host.updates.update(batch.with_token_columns(**columns), loss, step)
            deviations.append(metrics["ratio/max_deviation"])
        ends.append(weights(host))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[1], ends[2])
    assert max(deviations) < 1e-6

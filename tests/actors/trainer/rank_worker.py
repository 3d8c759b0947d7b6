"""One rank of a two-rank host, as a process: `python rank_worker.py RANK BASE INIT OUT SHARDING`.

The same scenarios run with one rank in the test's own process.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actors.algorithms.dpo import DpoLoss, OnlineDpoLoss
from actors.algorithms.kto import KtoLoss
from actors.algorithms.reward import RewardLoss
from actors.algorithms.sft import SftLoss
from actors.algorithms.value import ValueLoss
from actors.models.lora.adapters import adapter_digest
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import OptimSpec
from tests.actors.trainer.host_cases import (
    host_spec,
    pair_batch,
    random_pairs,
    random_rows,
    sft_batch,
    with_reference,
)

OPTIM = OptimSpec(learning_rate=2e-3, lr_scheduler_type="constant", max_grad_norm=1.0)
MICRO_TOKENS = 150
STEPS = 6


def scenarios(
    base: str,
    out: Path,
    rank: int = 0,
    world_size: int = 1,
    init: str | None = None,
    sharding: str = "none",
) -> dict[str, Any]:
    """Curves of several losses, then log-probabilities and a saved adapter."""
    spec = host_spec(base, max_tokens_per_micro_batch=MICRO_TOKENS, sharding=sharding)
    host = ModelHost(spec, rank, world_size, init, timeout_s=60)
    host.add_adapter("policy")
    results: dict[str, Any] = {}
    rows, pairs = random_rows(9 * STEPS), random_pairs(7 * STEPS)
    losses = {
        "sft": SftLoss(),
        "dpo": DpoLoss(loss_type=["sigmoid", "sft"]),
        "aot": DpoLoss(loss_type="aot"),
        "kto": KtoLoss(beta=1.0),
    }
    for name, loss in losses.items():
        host.updates.prepare_training("policy", OPTIM, STEPS)
        for step in range(STEPS):
            # The last step has a single row: with two ranks one of them has nothing to do.
            n = 1 if step == STEPS - 1 else 7
            if name == "sft":
                batch = sft_batch(rows[9 * step : 9 * step + n + 2])
            else:
                batch = with_reference(host, pair_batch(pairs[7 * step : 7 * step + n]))
            if name == "kto":  # rejected answers stand for mismatched ones
                ref = batch.columns
                batch = batch.with_columns(label=np.arange(n) % 2 == 0, ref_logps=ref["ref_chosen_logps"])
                batch = batch.with_columns(ref_kl_logps=ref["ref_rejected_logps"])
            for metric, value in host.updates.update(batch, loss, step).items():
                if "second" not in metric:
                    results.setdefault(f"{name}/{metric}", []).append(value)
        load = host.updates.router_load()
        assert load is not None
        results[f"{name}/load"] = load.reshape(-1).tolist()
        results[f"{name}/eval"] = [host.updates.evaluate(batch, loss, "policy")["loss"]]
    nothing = with_reference(host, pair_batch(pairs[:1])).select([])
    results["no pair"] = [host.updates.update(nothing, OnlineDpoLoss(), STEPS - 1)["grad_norm"]]
    results.update(heads(host, rows, pairs))
    results["logprobs"] = host.scores.logprobs(sft_batch(rows[:11]), "policy").tolist()
    results["digest"] = adapter_digest(host.state.model, "policy")
    host.saving.save_adapter("policy", out / "adapter")
    host.saving.save_checkpoint(out / "checkpoint")
    assert host.saving.load_checkpoint(out / "checkpoint") == STEPS
    results["taken over"] = taken_over(host, rows)
    host.close()
    return results


def taken_over(host: ModelHost, rows: list[Any]) -> list[float]:
    """Losses of steps that are done again from what was kept before them: to the bit those of the first
    time."""
    kept: list[Any] = []
    losses: list[float] = []
    host.updates.prepare_training("policy", OPTIM, STEPS)

    def keep(whole: bool) -> None:
        facts, state = host.kept.take(whole)
        assert facts.kept
        kept.append(pickle.loads(pickle.dumps(state)))  # As Ray does: it is of memory that changes.

    def step(number: int) -> None:
        batch = sft_batch(rows[9 * number : 9 * number + 9])
        losses.append(host.updates.update(batch, SftLoss(), number)["loss"])

    keep(whole=True)
    step(0)
    keep(whole=False)
    for number in (1, 2):
        step(number)
    after = adapter_digest(host.state.model, "policy")
    host.copy_adapter("reward", "critic")  # Adapters that don't train come back too.
    before = adapter_digest(host.state.model, "critic")
    host.kept.put(*kept)
    assert adapter_digest(host.state.model, "critic") != before
    for number in (1, 2):
        step(number)
    assert losses[1:3] == losses[3:5]
    assert adapter_digest(host.state.model, "policy") == after
    return losses


def heads(host: ModelHost, rows: list[Any], pairs: list[Any]) -> dict[str, Any]:
    """A reward model and a critic that take turns, then what they say."""
    results: dict[str, Any] = {}
    for role, init in (("reward", "normal"), ("critic", "zero")):
        host.add_adapter(role)
        host.add_head(role, init)
        host.updates.prepare_training(role, OPTIM, STEPS, keep=True)
    for step in range(STEPS):
        n = 1 if step == STEPS - 1 else 7
        batch = sft_batch(rows[9 * step : 9 * step + n])
        returns = np.random.default_rng(step).normal(size=int(batch.loss_mask.sum()))
        batch = batch.with_token_columns(returns=returns, old_values=0 * returns)
        margin = np.linspace(0, 1, n)
        of_pairs = pair_batch(pairs[7 * step : 7 * step + n], margin=margin)
        for role, loss, given in (("reward", RewardLoss(), of_pairs), ("critic", ValueLoss(), batch)):
            for metric, value in host.updates.update(given, loss, step, role).items():
                if "second" not in metric:
                    results.setdefault(f"{role}/{metric}", []).append(value)
    results["scores"] = host.scores.scores(pair_batch(pairs[:5]), "reward").tolist()
    results["values"] = host.scores.values(sft_batch(rows[:11]), "critic").tolist()
    return results


if __name__ == "__main__":
    rank_, base_, init_, out_, sharding_ = sys.argv[1:]
    found = scenarios(base_, Path(out_), int(rank_), 2, init_, sharding_)
    (Path(out_) / f"rank-{rank_}.json").write_text(json.dumps(found))

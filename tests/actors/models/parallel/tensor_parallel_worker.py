"""Several ranks of which two each hold a model together, as processes.

`python tensor_parallel_worker.py NUMBER BASE OUT INIT...`, an address for each host that is made. One rank
alone does the same in the test's own process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actors.algorithms.dpo import DpoLoss
from actors.algorithms.value import ValueLoss
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import HostSpec
from tests.actors.models.parallel.sharding_worker import (
    HALF,
    LORA,
    OPTIM,
    ROWS,
    STEPS,
    facts,
    losses,
    trained,
)
from tests.actors.rank_processes import as_forks
from tests.actors.trainer.host_cases import pair_batch, random_pairs, sft_batch, with_reference

PAIRS = random_pairs(5)


def spec(base: str, size: int, lora: LoraSpec | None = LORA) -> HostSpec:
    """Several micro-batches a step, and gradient checkpointing."""
    model = ModelSpec(
        base=base, lora=lora, moe=MoeSpec(router_aux_loss_coef=0.0), gradient_checkpointing=True
    )
    return HostSpec(model=model, tensor_parallel_size=size, max_tokens_per_micro_batch=60)


def of_pairs(host: ModelHost) -> dict[str, Any]:
    """What other losses and roles see: a loss over all rows at once, a critic, a policy and the bare base."""
    host.add_adapter("critic")
    host.add_head("critic", "normal")
    host.updates.prepare_training("critic", OPTIM, STEPS)
    rows = sft_batch(ROWS[:5])
    returns = np.linspace(-1, 1, int(rows.loss_mask.sum()))
    rows = rows.with_token_columns(returns=returns, old_values=0 * returns)
    critic = [host.updates.update(rows, ValueLoss(), step, "critic") for step in range(2)]
    host.updates.prepare_training("policy", OPTIM, STEPS)
    pairs = with_reference(host, pair_batch(PAIRS))
    aot = [host.updates.update(pairs, DpoLoss(loss_type="aot"), step) for step in range(2)]
    names = ("loss", "grad_norm")
    load = host.updates.router_load("policy")
    assert load is not None
    return {
        "critic": [metrics[name] for metrics in critic for name in names],
        "aot": [metrics[name] for metrics in aot for name in names],
        "load": load.tolist(),
        "values": host.scores.values(rows, "critic").tolist(),
        "logps": host.scores.token_logprobs(rows, "policy").tolist(),
    }


def run(base: str, rank: int, world: int, out: Path, inits: list[str]) -> dict[str, Any]:
    """LoRA, then full fine-tuning; both go on from what one rank left."""
    results: dict[str, Any] = {}
    addresses = iter(inits)

    def host(lora: LoraSpec | None) -> ModelHost:
        made = ModelHost(spec(base, 2, lora), rank, world, next(addresses), timeout_s=60)
        return trained(made, None if lora is None else "policy")

    for name, lora in (("lora", LORA), ("full", None)):
        made = host(lora)
        results[name] = losses(made, 0, HALF)
        made.saving.save_checkpoint(out / name)
        assert made.saving.load_checkpoint(out / f"one-{name}") == HALF
        results[f"{name} after one"] = losses(made, HALF, STEPS)
        results[f"{name} facts"] = facts(made, None if lora is None else "policy")
        if lora is None:
            made.saving.save_model(out / "model")
        else:
            made.saving.save_adapter("policy", out / "adapter")
            results |= of_pairs(made)
        made.close()
    return results


if __name__ == "__main__":
    number_, base_, out_, *inits_ = sys.argv[1:]

    def work(rank: int) -> None:
        found = run(base_, rank, int(number_), Path(out_), inits_)
        (Path(out_) / f"rank-{rank}.json").write_text(json.dumps(found))

    as_forks(int(number_), work)

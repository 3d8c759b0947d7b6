"""One of several ranks of which two each hold a model together, as a process.

`python tensor_parallel_worker.py RANK WORLD BASE OUT INIT...`, an address for each host that is made. One
rank alone does the same in the test's own process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actors.algorithms.dpo import DpoLoss
from actors.algorithms.sft import SftLoss
from actors.algorithms.value import ValueLoss
from actors.host import ModelHost
from actors.host_spec import HostSpec
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from actors.optim_spec import OptimSpec
from tests.actors.host_cases import pair_batch, random_pairs, random_rows, sft_batch, with_reference
from tests.actors.sharding_worker import facts

OPTIM = OptimSpec(learning_rate=2e-3, lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=0.5)
HALF, STEPS = 1, 3
ROWS, PAIRS = random_rows(6 * STEPS, longest=24), random_pairs(5)
LORA = LoraSpec(r=4, targets=["attention", "experts", "router"])


def spec(base: str, size: int, lora: LoraSpec | None = LORA) -> HostSpec:
    """Several micro-batches a step, and gradient checkpointing."""
    model = ModelSpec(
        base=base, lora=lora, moe=MoeSpec(router_aux_loss_coef=0.0), gradient_checkpointing=True
    )
    return HostSpec(model=model, tensor_parallel_size=size, max_tokens_per_micro_batch=60)


def losses(host: ModelHost, first: int, last: int) -> list[float]:
    """Of some steps; the last has one row, so that one of two groups has nothing to do."""
    batches = [sft_batch(ROWS[6 * s : 6 * s + (1 if s == STEPS - 1 else 5)]) for s in range(first, last)]
    return [host.update(batch, SftLoss(), first + i)["loss"] for i, batch in enumerate(batches)]


def trained(host: ModelHost, role: str | None) -> ModelHost:
    """Ready for its first step."""
    if role is not None:
        host.add_adapter(role)
    host.prepare_training(role, OPTIM, STEPS)
    return host


def of_pairs(host: ModelHost) -> dict[str, Any]:
    """What other losses and roles see: a loss over all rows at once, a critic, a policy and the bare base."""
    host.add_adapter("critic")
    host.add_head("critic", "normal")
    host.prepare_training("critic", OPTIM, STEPS)
    rows = sft_batch(ROWS[:5])
    returns = np.linspace(-1, 1, int(rows.loss_mask.sum()))
    rows = rows.with_token_columns(returns=returns, old_values=0 * returns)
    critic = [host.update(rows, ValueLoss(), step, "critic") for step in range(2)]
    host.prepare_training("policy", OPTIM, STEPS)
    pairs = with_reference(host, pair_batch(PAIRS))
    aot = [host.update(pairs, DpoLoss(loss_type="aot"), step) for step in range(2)]
    names = ("loss", "grad_norm")
    load = host.router_load("policy")
    assert load is not None
    return {
        "critic": [metrics[name] for metrics in critic for name in names],
        "aot": [metrics[name] for metrics in aot for name in names],
        "load": load.tolist(),
        "values": host.values(rows, "critic").tolist(),
        "logps": host.token_logprobs(rows, "policy").tolist(),
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
        made.save_checkpoint(out / name)
        assert made.load_checkpoint(out / f"one-{name}") == HALF
        results[f"{name} after one"] = losses(made, HALF, STEPS)
        results[f"{name} facts"] = facts(made, None if lora is None else "policy")
        if lora is None:
            made.save_model(out / "model")
        else:
            made.save_adapter("policy", out / "adapter")
            results |= of_pairs(made)
        made.close()
    return results


if __name__ == "__main__":
    rank_, world_, base_, out_, *inits_ = sys.argv[1:]
    found_ = run(base_, int(rank_), int(world_), Path(out_), inits_)
    (Path(out_) / f"rank-{rank_}.json").write_text(json.dumps(found_))

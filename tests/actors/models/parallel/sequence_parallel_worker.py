"""Several ranks that share out the positions of the same rows, as processes.

`python sequence_parallel_worker.py NUMBER SIZE BASE OUT INIT...`, an address for each host that is made. One
rank alone does the same in the test's own process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from actors.algorithms.distillation import TOP_IDS, TOP_LOGPS, DistillLoss
from actors.algorithms.dpo import DpoLoss
from actors.algorithms.sft import SftLoss
from actors.algorithms.value import ValueLoss
from actors.batches.batch import Batch
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import HostSpec, OptimSpec
from tests.actors.rank_processes import as_forks
from tests.actors.trainer.host_cases import pair_batch, random_rows, sft_batch, with_reference
from tests.actors.trainer.test_host_replay import routed_batch

OPTIM = OptimSpec(learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd")
"""Adam would make steps of one size of gradients that are nothing but rounding."""
LORA = LoraSpec(r=4, targets=["attention", "experts", "router"])
STEPS = 2
ROWS = random_rows(5 * STEPS, longest=61)
HOSTS = ("none", "base", "full", "experts", "whole")
"""Sharding of each host that is made; `whole` is full fine-tuning, with the routers' auxiliary loss."""


def pairs() -> Batch:
    """Of prompts that the answers share, one of which is much longer than the other."""
    generator = np.random.default_rng(1)
    found = []
    for prompt, good, bad in ((30, 9, 12), (7, 20, 3), (3, 2, 41)):
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        sizes = zip(names, (prompt, good, bad), strict=True)
        found.append({name: generator.integers(3, 250, n).tolist() for name, n in sizes})
    return pair_batch(found)


def host(base: str, kind: str, size: int, place: tuple[int, int, str | None]) -> ModelHost:
    whole = kind == "whole"
    replay: Literal["rollout", "none"] = "rollout" if kind == "none" else "none"
    moe = MoeSpec(router_aux_loss_coef=0.01 if whole else 0.0, router_replay=replay)
    model = ModelSpec(base=base, lora=None if whole else LORA, moe=moe, gradient_checkpointing=whole)
    # Several micro-batches a step, with one rank as with more.
    spec = HostSpec(
        model=model,
        sequence_parallel_size=size,
        max_tokens_per_micro_batch=80 // size,
        sharding="none" if whole or place[1] == 1 else kind,  # type: ignore[arg-type]
    )
    made = ModelHost(spec, *place, timeout_s=60)
    if not whole:
        made.add_adapter("policy")
    made.updates.prepare_training(None if whole else "policy", OPTIM, STEPS)
    return made


def metrics(step: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in step.items() if "second" not in name}


def gradient(made: ModelHost) -> torch.Tensor:
    """Of the last step, all of it."""
    grads = [p.grad for p in made.updates.training.parameters.values()]
    return torch.cat([grad.reshape(-1) for grad in grads if grad is not None])


def run(base: str, size: int, rank: int, world: int, inits: list[str | None], out: Path) -> dict[str, Any]:
    """What each host finds; its gradients go to files."""
    results: dict[str, Any] = {}
    for kind, init in zip(HOSTS, inits, strict=True):
        made = host(base, kind, size, (rank, world, init))
        batches = [sft_batch(ROWS[5 * step : 5 * step + (1 if step else 5)]) for step in range(STEPS)]
        # The last step has one row: with two groups one of them has nothing to do.
        for step, batch in enumerate(batches):
            results[f"{kind}/sft/{step}"] = metrics(made.updates.update(batch, SftLoss(), step))
            if step == 0 and kind != "full":  # there each rank has its slices
                torch.save(gradient(made), out / f"{kind}-sft-{rank}.pt")
        load = made.updates.router_load()
        assert load is not None
        results[f"{kind}/load"] = load.tolist()
        if kind == "none":
            results |= others(made, rank, out)
        made.close()
    return results


def others(made: ModelHost, rank: int, out: Path) -> dict[str, Any]:
    """What other losses and roles see: pairs, a loss over all rows at once, a critic, the bare base."""
    found: dict[str, Any] = {}
    batch = with_reference(made, pairs())
    for loss in ("sigmoid", "aot"):
        made.updates.prepare_training("policy", OPTIM, STEPS)
        found[loss] = metrics(made.updates.update(batch, DpoLoss(loss_type=loss), 0))
        torch.save(gradient(made), out / f"{loss}-{rank}.pt")
    rows = sft_batch(ROWS[:4])
    teacher = made.scores.top_logprobs(rows, None, 4, 0.5)
    ids, logps = np.split(teacher, 2, axis=1)
    counted = {"mask": np.ones(len(ids), bool), "old_logps": made.scores.token_logprobs(rows, "policy")}
    taught = rows.with_token_columns(**{TOP_IDS: ids.astype(np.int64), TOP_LOGPS: logps}, **counted)
    found["teacher"] = teacher.reshape(-1).tolist()
    made.updates.prepare_training("policy", OPTIM, STEPS)
    found["taught"] = metrics(made.updates.update(taught, DistillLoss(beta=0.5), 0))
    torch.save(gradient(made), out / f"taught-{rank}.pt")
    made.add_adapter("critic")
    made.add_head("critic", "normal")
    made.updates.prepare_training("critic", OPTIM, STEPS)
    returns = np.linspace(-1, 1, int(rows.loss_mask.sum()))
    rows = rows.with_token_columns(returns=returns, old_values=0 * returns)
    found["critic"] = metrics(made.updates.update(rows, ValueLoss(), 0, "critic"))
    found["values"] = made.scores.values(rows, "critic").tolist()
    found["scores"] = made.scores.scores(batch, "critic").tolist()
    found["logps"] = made.scores.token_logprobs(rows, "policy").tolist()
    found["replayed"] = made.scores.token_logprobs(routed_batch(), "policy").tolist()
    agreement = made.scores.route_agreement()
    assert agreement is not None
    found["agreement"] = agreement.tolist()
    found["reference"] = made.scores.logprobs(rows, None).tolist()
    return found


if __name__ == "__main__":
    number_, size_, base_, out_, *inits_ = sys.argv[1:]

    def work(rank: int) -> None:
        found = run(base_, int(size_), rank, int(number_), list(inits_), Path(out_))
        (Path(out_) / f"rank-{rank}.json").write_text(json.dumps(found))

    as_forks(int(number_), work)

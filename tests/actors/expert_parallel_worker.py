"""One rank of two that share the experts, a process: `expert_parallel_worker.py RANK BASE OUT INIT...`.

`init` addresses: one for each host that is made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actors.host import ModelHost
from actors.host_spec import HostSpec
from actors.models.sharding import is_sharded, own_slice
from actors.models.spec import ModelSpec, MoeSpec
from tests.actors.host_cases import sft_batch
from tests.actors.sharding_worker import HALF, LORA, ROWS, STEPS, facts, losses, spec, trained


def with_aux(base: str, sharding: str) -> HostSpec:
    """No gradient checkpointing, so that the last experts leave out what nobody reads; the auxiliary loss of
    each rank's tokens, replayed routes."""
    model = ModelSpec(base=base, lora=LORA, moe=MoeSpec(router_aux_loss_coef=0.02, router_replay="rollout"))
    return HostSpec(model=model, sharding=sharding)  # type: ignore[arg-type]


def one_row_each(host: ModelHost) -> dict[str, Any]:
    """Loss, auxiliary loss and routing of a batch, and what scoring says of it."""
    from actors.algorithms.sft import SftLoss

    batch = sft_batch(ROWS[:2])
    host.add_head("policy", "normal")
    before = host.token_logprobs(batch, "policy")
    scores = host.scores(batch, "policy")
    metrics = host.update(batch, SftLoss(), 0)
    load = host.router_load("policy")
    assert load is not None
    keys = ("loss", "aux_loss", "grad_norm", "moe/entropy", "moe/maxvio")
    return {
        "logprobs": before.tolist(),
        "reference": host.token_logprobs(batch, None).tolist(),
        "scores": scores.tolist(),
        "metrics": {key: metrics[key] for key in keys},
        "load": load.tolist(),
    }


def run(base: str, rank: int, out: Path, inits: list[str]) -> dict[str, Any]:
    """LoRA from the checkpoint of one rank, full fine-tuning, then a pass with all that looks at routes."""
    results: dict[str, Any] = {}
    addresses = iter(inits)

    def host_of(what: HostSpec, role: str | None) -> ModelHost:
        return trained(ModelHost(what, rank, 2, next(addresses), timeout_s=60), role)

    host = host_of(spec(base, "experts"), "policy")
    whole = {n: p for n, p in host.base.named_parameters() if is_sharded(p)}
    results["held"] = {n: [list(p.shape), list(own_slice(p).shape)] for n, p in whole.items()}
    results["lora"] = losses(host, 0, HALF)
    host.save_checkpoint(out / "lora")
    assert host.load_checkpoint(out / "one") == HALF
    results["lora"] += losses(host, HALF, STEPS)
    host.save_adapter("policy", out / "lora-adapter")
    results["lora facts"] = facts(host, "policy")
    host.close()

    host = host_of(spec(base, "experts", None), None)
    results["whole"] = losses(host, 0, HALF)
    host.save_checkpoint(out / "whole")
    results["whole"] += losses(host, HALF, STEPS)
    host.save_model(out / "whole-model")
    results["whole facts"] = facts(host, None)
    host.close()

    for sharding in ("experts", "none"):
        host = host_of(with_aux(base, sharding), "policy")
        results[f"routes under {sharding}"] = one_row_each(host)
        host.close()
    return results


if __name__ == "__main__":
    rank_, base_, out_, *inits_ = sys.argv[1:]
    np.seterr(all="raise")
    found_ = run(base_, int(rank_), Path(out_), inits_)
    (Path(out_) / f"rank-{rank_}.json").write_text(json.dumps(found_))

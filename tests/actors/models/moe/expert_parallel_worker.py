"""One rank of two that share the experts, a process: `expert_parallel_worker.py RANK BASE OUT INIT...`.

`init` addresses: one for each host that is made.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.algorithms.sft import SftLoss
from actors.models.parallel.fsdp import is_sharded, own_slice
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import HostSpec
from tests.actors.models.parallel.sharding_worker import (
    HALF,
    LORA,
    ROWS,
    STEPS,
    facts,
    losses,
    spec,
    trained,
    trained_whole,
)
from tests.actors.trainer.host_cases import sft_batch

LAYERS = 2
"""Of the tiny base."""


def with_routes(base: str, sharding: str, lora: LoraSpec | None) -> HostSpec:
    """No gradient checkpointing, so that the last experts leave out what nobody reads; the auxiliary loss of
    each rank's tokens; routes may be given."""
    moe = MoeSpec(router_aux_loss_coef=0.02, router_replay="rollout")
    model = ModelSpec(base=base, lora=lora, moe=moe)
    return HostSpec(model=model, sharding=sharding)  # type: ignore[arg-type]


def looked_at(host: ModelHost, role: str | None) -> dict[str, Any]:
    """What updates, scoring and the routers say: of a row for each rank, then with one.s experts alone."""
    found: dict[str, Any] = {}
    batch = sft_batch(ROWS[:2])
    crowded = replace(batch, experts=np.tile(np.arange(2, dtype=np.uint8), (batch.n_tokens, LAYERS, 1)))
    if role is not None:
        host.add_head(role, "normal")
        found["scores"] = host.scores.scores(batch, role).tolist()
        found["reference"] = host.scores.token_logprobs(batch, None).tolist()
    for step, routed in enumerate((batch, crowded)):
        found[f"logprobs {step}"] = host.scores.token_logprobs(routed, role).tolist()
        metrics = host.updates.update(routed, SftLoss(), step)
        found[f"metrics {step}"] = [metrics[key] for key in ("loss", "aux_loss", "grad_norm", "moe/maxvio")]
        load = host.updates.router_load(role)
        assert load is not None
        found[f"load {step}"] = load.tolist()
    return found


def run(base: str, rank: int, out: Path, inits: list[str]) -> dict[str, Any]:
    """LoRA from the checkpoint of one rank, full fine-tuning, then all that looks at routes, beside the
    same with replicas."""
    results: dict[str, Any] = {}
    addresses = iter(inits)

    def host_of(what: HostSpec, role: str | None) -> ModelHost:
        return trained(ModelHost(what, rank, 2, next(addresses), timeout_s=60), role)

    host = host_of(spec(base, "experts"), "policy")
    whole = {n: p for n, p in host.state.base.named_parameters() if is_sharded(p)}
    results["held"] = {n: [list(p.shape), list(own_slice(p).shape)] for n, p in whole.items()}
    results["lora"] = losses(host, 0, HALF)
    host.saving.save_checkpoint(out / "lora")
    assert host.saving.load_checkpoint(out / "one") == HALF
    results["lora"] += losses(host, HALF, STEPS)
    host.saving.save_adapter("policy", out / "lora-adapter")
    results["lora facts"] = facts(host, "policy")
    host.close()

    results |= trained_whole(host_of(spec(base, "experts", None), None), out)

    for sharding in ("experts", "none"):
        for lora, role in ((LORA, "policy"), (None, None)):
            host = host_of(with_routes(base, sharding, lora), role)
            results[f"{sharding} {role}"] = looked_at(host, role)
            host.close()
    return results


if __name__ == "__main__":
    rank_, base_, out_, *inits_ = sys.argv[1:]
    np.seterr(all="raise")
    found_ = run(base_, int(rank_), Path(out_), inits_)
    (Path(out_) / f"rank-{rank_}.json").write_text(json.dumps(found_))

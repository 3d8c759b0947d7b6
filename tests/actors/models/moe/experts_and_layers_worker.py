"""One of four ranks that share experts and split the rest, all forks of one process.

`python experts_and_layers_worker.py 4 BASE OUT INIT...`, an address for each case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from actors.models.parallel.fsdp import is_sharded, own_slice
from actors.models.spec import LoraSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import HostSpec
from tests.actors.models.parallel.sharding_worker import HALF, LORA, STEPS, facts, losses, spec, trained
from tests.actors.rank_processes import as_forks

CASES: dict[str, tuple[str, int | None, LoraSpec | None]] = {
    "base of four": ("experts+base", None, LORA),
    "full of two and two": ("experts+full", 2, LORA),
    "all of two and two": ("experts+full", 2, None),
    "all of four": ("experts+full", None, None),
    "experts of two and two": ("experts", 2, None),
}
"""Name -> sharding, ranks that share the experts, LoRA."""


def case_spec(base: str, sharding: str, size: int | None, lora: LoraSpec | None) -> HostSpec:
    """As of other ways to split: gradient checkpointing, several micro-batches a step."""
    return spec(base, sharding, lora).model_copy(update={"expert_parallel_size": size})


def held(host: ModelHost) -> dict[str, list[list[int]]]:
    """Of two weights of the base: the whole shape, and that of this rank's part."""
    layer = host.state.base.model.layers[0]
    weights = {
        "experts": next(p for n, p in layer.named_parameters() if n.endswith("gate_up_proj")),
        "o_proj": next(p for n, p in layer.named_parameters() if "o_proj" in n and "lora" not in n),
    }
    return {
        name: [list(weight.shape), list(own_slice(weight).shape)]
        for name, weight in weights.items()
        if is_sharded(weight)
    }


def run(base: str, rank: int, world: int, out: Path, inits: list[str]) -> dict[str, Any]:
    """Each case: the first half, then the second half from what one rank left."""
    results: dict[str, Any] = {}
    for (name, (sharding, size, lora)), init in zip(CASES.items(), inits, strict=True):
        role = None if lora is None else "policy"
        made = ModelHost(case_spec(base, sharding, size, lora), rank, world, init, timeout_s=60)
        host = trained(made, role)
        found: dict[str, Any] = {"held": held(host), "first": losses(host, 0, HALF)}
        host.saving.save_checkpoint(out / name)
        assert host.saving.load_checkpoint(out / ("one-lora" if role else "one-all")) == HALF
        found["second"] = losses(host, HALF, STEPS)
        found["facts"] = facts(host, role)
        if role:
            host.saving.save_adapter(role, out / f"{name}-adapter")
        else:
            host.saving.save_model(out / f"{name}-model")
        host.close()
        results[name] = found
    return results


if __name__ == "__main__":
    number_, base_, out_, *inits_ = sys.argv[1:]

    def work(rank: int) -> None:
        found = run(base_, rank, int(number_), Path(out_), inits_)
        (Path(out_) / f"rank-{rank}.json").write_text(json.dumps(found))

    as_forks(int(number_), work)

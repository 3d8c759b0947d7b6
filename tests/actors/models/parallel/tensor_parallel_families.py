"""Two ranks: logits and gradients of bases that both hold together against whole ones.

`python tensor_parallel_families.py NUMBER INIT DIRECTORY FAMILY...`; each family once with every weight
trained and once with LoRA on all of its groups.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from actors.models.base.loading import load_base
from actors.models.lora.adapters import adapter_parameters, attach_lora
from actors.models.moe.experts_forward import use_fused
from actors.models.parallel.fsdp import is_sharded, whole
from actors.models.parallel.tensor_parallel import share_names
from actors.models.spec import LoraSpec, ModelSpec
from actors.trainer.process_groups import Ranks
from tests.actors.models.conftest import shake
from tests.actors.models.parallel.sharding_families import furthest, passed
from tests.actors.models.tiny_models import GROUPS, tiny_model
from tests.actors.rank_processes import as_forks


def difference(base: Path, lora: LoraSpec | None, ranks: Ranks) -> tuple[float, float]:
    """(largest difference of logits, largest relative one of gradients), a split base from a whole one."""
    logits, gradients = [], []
    for mesh in (None, ranks.mesh):
        model: Any = load_base(ModelSpec(base=str(base), lora=lora), mesh=mesh)
        assert any(map(is_sharded, model.parameters())) == (mesh is not None)
        parameters = dict(model.named_parameters())
        if lora is not None:
            use_fused(model)
            model = attach_lora(model, lora, "policy", seed=3)
            shake(model, "policy")
            parameters = adapter_parameters(model, "policy")
            assert not any(map(is_sharded, parameters.values()))
        found, grads = passed(model, parameters)
        shares = share_names(model) if mesh is not None else set()
        for name in sorted(shares & {n for n, g in grads.items() if g is not None}):
            dist.all_reduce(grads[name])
        logits.append(found)
        gradients.append({n: None if g is None else whole(g) for n, g in grads.items()})
    return float((logits[0] - logits[1]).abs().max()), furthest(*gradients)


def run(rank: int, init: str, directory: Path, families: list[str]) -> dict[str, tuple[float, float]]:
    """Of every family."""
    ranks, found = Ranks(rank, 2, init, timeout_s=60, tensor_parallel_size=2), {}
    for family in families:
        if rank == 0:
            tiny_model(family).save_pretrained(directory / family)
        ranks.wait()
        lora = LoraSpec(r=4, targets=list(GROUPS[family]))
        found[f"{family}, all weights"] = difference(directory / family, None, ranks)
        found[f"{family}, LoRA"] = difference(directory / family, lora, ranks)
    ranks.close()
    return found


if __name__ == "__main__":
    number_, init_, out_, *families_ = sys.argv[1:]

    def work(rank: int) -> None:
        found = run(rank, init_, Path(out_), families_)
        (Path(out_) / f"rank-{rank}.json").write_text(json.dumps(found))

    as_forks(int(number_), work)

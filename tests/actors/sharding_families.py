"""One rank of two: logits and adapter gradients of sharded bases against whole ones.

`python sharding_families.py RANK INIT DIRECTORY FAMILY...`; both ranks see the same tokens, so that a whole
model in the same process says what has to come out. A family may be `NAME+tied`: tied embeddings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from actors.models.adapters import adapter_parameters, attach_lora
from actors.models.loading import load_base
from actors.models.sharding import is_sharded, reshard
from actors.models.spec import LoraSpec, ModelSpec
from tests.actors.models.conftest import shake
from tests.actors.models.tiny_models import GROUPS, tiny_model


def difference(base: Path, lora: LoraSpec) -> tuple[float, float]:
    """(largest difference of logits, largest relative one of gradients), a sharded base from a whole one."""
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    logits, gradients = [], []
    for shards in (1, 2):
        model = load_base(ModelSpec(base=str(base), lora=lora), shards=shards)
        assert all(is_sharded(p) == (shards > 1) for p in model.parameters())
        peft = attach_lora(model, lora, "policy", seed=3)
        shake(peft, "policy")
        output = peft(input_ids=ids).logits
        output.log_softmax(-1)[..., 5].sum().backward()
        reshard(model)
        logits.append(output.detach())
        gradients.append({n: p.grad for n, p in adapter_parameters(peft, "policy").items()})
    whole, sliced = gradients
    off = [
        float((g - sliced[n]).abs().max() / g.abs().max().clamp_min(1e-6))
        for n, g in whole.items()
        if g is not None
    ]
    assert [n for n, g in whole.items() if g is None] == [n for n, g in sliced.items() if g is None]
    return float((logits[0] - logits[1]).abs().max()), max(off)


def run(rank: int, directory: Path, families: list[str]) -> dict[str, tuple[float, float]]:
    """Of every family."""
    found = {}
    for family in families:
        name, _, tied = family.partition("+")
        if rank == 0:
            tiny_model(name, **({"tie_word_embeddings": True} if tied else {})).save_pretrained(
                directory / family
            )
        dist.barrier()
        found[family] = difference(directory / family, LoraSpec(r=4, targets=list(GROUPS[name])))
    return found


if __name__ == "__main__":
    rank_, init_, out_, *families_ = sys.argv[1:]
    dist.init_process_group("gloo", init_method=init_, rank=int(rank_), world_size=2)
    found_ = run(int(rank_), Path(out_), families_)
    (Path(out_) / f"rank-{rank_}.json").write_text(json.dumps(found_))
    dist.destroy_process_group()

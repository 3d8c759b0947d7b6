"""One rank of two: logits and gradients of sharded bases against whole ones.

`python sharding_families.py RANK INIT DIRECTORY FAMILY...`; both ranks see the same tokens, so that a whole
model in the same process says what has to come out. A family may be `NAME+tied`: tied embeddings, or
`NAME+experts`: each rank holds some experts; `NAME+experts+all`: and every parameter trains.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from actors.models.base.loading import load_base
from actors.models.lora.adapters import adapter_parameters, attach_lora, enable_gradient_checkpointing
from actors.models.parallel.fsdp import is_sharded, reshard, whole
from actors.models.spec import LoraSpec, ModelSpec
from tests.actors.models.conftest import shake
from tests.actors.models.tiny_models import GROUPS, tiny_model

IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))


def two() -> DeviceMesh:
    """Both ranks."""
    return init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))


def difference(base: Path, lora: LoraSpec) -> tuple[float, float]:
    """(largest difference of logits, largest relative one of gradients), a sharded base from a whole one."""
    logits, gradients = [], []
    for mesh in (None, two()):
        model = load_base(ModelSpec(base=str(base), lora=lora), mesh=mesh, split="layers")
        assert all(is_sharded(p) == (mesh is not None) for p in model.parameters())
        peft = attach_lora(model, lora, "policy", seed=3)
        shake(peft, "policy")
        found = passed(peft, adapter_parameters(peft, "policy"))
        reshard(model)
        logits.append(found[0])
        gradients.append(found[1])
    return float((logits[0] - logits[1]).abs().max()), furthest(*gradients)


def difference_by_experts(base: Path, lora: LoraSpec, trains: str) -> tuple[float, float]:
    """The same where tokens travel to the experts, by an adapter's gradients whose tokens travel
    again in the backward pass, or by those of `all` weights."""
    logits, gradients = [], []
    for mesh in (None, two()):
        split = mesh is not None
        model: Any = load_base(ModelSpec(base=str(base), lora=lora), mesh=mesh, split="experts")
        parameters = dict(model.named_parameters())
        stacks = {n for n, p in parameters.items() if ".experts." in n and p.ndim > 1}
        assert {n for n, p in parameters.items() if is_sharded(p)} == (stacks if split else set())
        if trains != "all":
            model = attach_lora(model, lora, "policy", seed=3)
            shake(model, "policy")
            parameters = adapter_parameters(model, "policy")
            if split:
                enable_gradient_checkpointing(model)
                model.train()
        found = passed(model, parameters)
        logits.append(found[0])
        gradients.append({n: of_both(g, parameters[n]) if split else g for n, g in found[1].items()})
    return float((logits[0] - logits[1]).abs().max()), furthest(*gradients)


def passed(model: Any, parameters: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits and gradients."""
    output = model(input_ids=IDS).logits
    output.log_softmax(-1)[..., 5].sum().backward()
    return output.detach(), {n: p.grad for n, p in parameters.items()}


def of_both(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """Half of the sum over ranks, which have the same tokens: of split weights every rank's part is a sum."""
    if is_sharded(like):
        return None if gradient is None else whole(gradient) / 2
    there = torch.zeros_like(like) if gradient is None else gradient.clone()
    some = torch.tensor(float(gradient is not None))
    dist.all_reduce(there)
    dist.all_reduce(some)
    return there / 2 if some else None


def furthest(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> float:
    """The largest difference of a gradient, relative to its largest element."""
    off = []
    for name, gradient in one.items():
        there = other[name]
        assert (gradient is None) == (there is None), name
        if gradient is not None and there is not None:
            off.append(float((gradient - there).abs().max() / gradient.abs().max().clamp_min(1e-6)))
    return max(off)


def run(rank: int, directory: Path, families: list[str]) -> dict[str, tuple[float, float]]:
    """Of every family."""
    found = {}
    for family in families:
        name, _, how = family.partition("+")
        if rank == 0:
            tied = {"tie_word_embeddings": True} if how == "tied" else {}
            tiny_model(name, **tied).save_pretrained(directory / family)
        dist.barrier()
        lora = LoraSpec(r=4, targets=list(GROUPS[name]))
        found[family] = (
            difference_by_experts(directory / family, lora, how.removeprefix("experts+"))
            if how.startswith("experts")
            else difference(directory / family, lora)
        )
    return found


if __name__ == "__main__":
    rank_, init_, out_, *families_ = sys.argv[1:]
    dist.init_process_group("gloo", init_method=init_, rank=int(rank_), world_size=2)
    found_ = run(int(rank_), Path(out_), families_)
    (Path(out_) / f"rank-{rank_}.json").write_text(json.dumps(found_))
    dist.destroy_process_group()

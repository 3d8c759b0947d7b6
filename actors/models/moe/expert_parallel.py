"""Expert parallelism: stacks of experts sliced over the ranks; everything else whole on each, or split too.

A stack is a DTensor of which each rank holds the rows of its experts, as `actors.models.parallel.fsdp` has
sliced weights, but it is never gathered for a pass: tokens are sent to the experts
(`actors.models.moe.token_dispatch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actors.errors import UserError
from actors.models.moe.experts_forward import UNMERGED
from actors.models.parallel.fsdp import shard_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SPLIT = "_raylign_split_experts"
"""Attribute of experts that ranks share out."""


def split_experts(model: Any, mesh: DeviceMesh, device: str | torch.device) -> None:
    """In place of each stack of experts this rank's slice; of stacks on the meta device only the shape is
    known.

    Args:
        model: the causal model.
        mesh: one dimension, the ranks that share the experts.
        device: of this rank.

    Raises:
        UserError: the model has no stacks of experts, or none that the ranks can share evenly.
    """
    stacks = [m for m in model.modules() if "_is_expert_parallel" in m.__dict__]
    if not stacks or not model._can_set_experts_implementation():
        raise UserError(f"sharding: experts: a {model.config.model_type} model has no experts to split")
    ranks = mesh.size()
    for experts in stacks:
        for name, parameter in list(experts.named_parameters(recurse=False)):
            if len(parameter) % ranks:
                raise UserError(
                    f"sharding: experts: {len(parameter)} experts can't be shared evenly by {ranks} workers"
                )
            setattr(experts, name, _own(parameter, mesh, device))
        setattr(experts, _SPLIT, True)
    model.set_experts_implementation(UNMERGED)


def split_experts_and_layers(model: Any, mesh: DeviceMesh, device: str | torch.device) -> None:
    """Experts as `split_experts` does it, and all other weights by `shard_layers`, on the same mesh.

    Raises:
        UserError: as these two.
    """
    split_experts(model, mesh, device)
    apart = [m for m in model.modules() if is_split(m)]
    held = [dict(experts.named_parameters(recurse=False)) for experts in apart]
    # FSDP takes charge of all that it finds in a layer, and of nothing that comes later.
    for experts, parameters in zip(apart, held):
        for name in parameters:
            delattr(experts, name)
    shard_layers(model, mesh)
    for experts, parameters in zip(apart, held):
        for name, parameter in parameters.items():
            experts.register_parameter(name, parameter)


def is_split(experts: nn.Module) -> bool:
    """True for experts that ranks share out, which are never gathered."""
    return _SPLIT in experts.__dict__


def _own(parameter: nn.Parameter, mesh: DeviceMesh, device: str | torch.device) -> nn.Parameter:
    from torch.distributed.tensor import DTensor, Shard

    each = len(parameter) // mesh.size()
    own = parameter.detach()[mesh.get_local_rank() * each :][:each]
    # A copy: a view would keep the whole stack in memory.
    own = own.clone() if own.is_meta else own.clone().to(device)
    shape, stride = parameter.shape, parameter.stride()
    sliced = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return nn.Parameter(sliced, requires_grad=parameter.requires_grad)

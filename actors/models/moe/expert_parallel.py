"""Expert parallelism: stacks of experts sliced over the ranks, everything else whole on each.

A stack is a DTensor of which each rank holds the rows of its experts, as `actors.models.parallel.fsdp` has
sliced weights, but it is never gathered for a pass: tokens are sent to the experts
(`actors.models.moe.token_dispatch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from actors.errors import UserError
from actors.models.moe.experts_forward import UNMERGED
from actors.models.parallel.partial_loading import load_divided

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_split_experts(
    model_class: type[PreTrainedModel], base_path: str, device: str | torch.device, how: dict[str, Any]
) -> PreTrainedModel:
    """`from_pretrained` on the meta device; then each rank reads all but the experts of others.

    Args:
        model_class: of the model itself; automatic ones can't be told how to split.
        device: of this rank.
        how: further arguments of `from_pretrained`.

    Raises:
        UserError: as `split_experts`.
    """
    model = load_divided(model_class, base_path, lambda model: _slice_experts(model, device), device, how)
    model.set_experts_implementation(UNMERGED)
    return model


def split_experts(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Split the experts of a model that is whole on every rank; the rest goes to `device`.

    Raises:
        UserError: it has no stacks of experts, or none that the ranks can share evenly.
    """
    _slice_experts(model, device)
    model.set_experts_implementation(UNMERGED)
    return model.to(device)


def _slice_experts(model: PreTrainedModel, device: str | torch.device) -> None:
    """Replace each stack by its slice; of stacks on the meta device only the shape is known."""
    from torch.distributed.device_mesh import init_device_mesh

    stacks = [m for m in model.modules() if "_is_expert_parallel" in m.__dict__]
    if not stacks or not model._can_set_experts_implementation():
        raise UserError(f"sharding: experts: a {model.config.model_type} model has no experts to split")
    ranks = dist.get_world_size()
    mesh = init_device_mesh(torch.device(device).type, (ranks,), mesh_dim_names=("experts",))
    for experts in stacks:
        for name, parameter in list(experts.named_parameters(recurse=False)):
            if len(parameter) % ranks:
                raise UserError(
                    f"sharding: experts: {len(parameter)} experts can't be shared evenly by {ranks} workers"
                )
            setattr(experts, name, _own(parameter, mesh, device))


def _own(parameter: nn.Parameter, mesh: Any, device: str | torch.device) -> nn.Parameter:
    from torch.distributed.tensor import DTensor, Shard

    each = len(parameter) // mesh.size()
    own = parameter.detach()[mesh.get_local_rank() * each :][:each]
    # A copy: a view would keep the whole stack in memory.
    own = own.clone() if own.is_meta else own.clone().to(device)
    shape, stride = parameter.shape, parameter.stride()
    sliced = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return nn.Parameter(sliced, requires_grad=parameter.requires_grad)

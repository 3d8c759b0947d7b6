"""A base in slices: torch's `fully_shard` (FSDP2), one group of weights per layer.

A sharded weight is a DTensor outside the forward pass of its layer and a plain tensor inside. Loaded, no
rank ever holds more than its slices and what one layer of the checkpoint needs on the way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actors.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a slice only."""
    # Asking imports nothing: where nothing has made a DTensor, there is none.
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its slices, without gradient. Collective where it is sharded: every rank has to
    come here, in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_slice(tensor: Tensor) -> Tensor:
    """This rank's part, in the same storage; all of a tensor that is not sharded."""
    found: Tensor = getattr(tensor.detach(), "_local_tensor", tensor.detach())
    return found


def own_rows(tensor: Tensor) -> slice | None:
    """Rows (dimension 0) that this rank holds; None: all."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    shape, offsets = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    if tuple(shape[1:]) != tuple(sharded.shape[1:]):
        raise NotImplementedError(f"sharded along {sharded.placements}: only rows (dimension 0) are handled")
    return slice(offsets[0], offsets[0] + shape[0]) if shape[0] else slice(0, 0)


def split_dims(tensor: Tensor) -> set[int]:
    """Dimensions along which ranks hold parts of a tensor; empty where it is whole."""
    if not is_sharded(tensor):
        return set()
    placements: Any = tensor.placements
    return {p.dim % tensor.ndim for p in placements if not p.is_replicate()}


def own_part(value: Any, like: Tensor) -> Tensor:
    """Of a whole tensor, or a slice of a safetensors file, what this rank holds of something split as `like`
    is. Not collective."""
    if not is_sharded(like):
        found: Tensor = value[...]
        return found
    from transformers.distributed.sharding_utils import DtensorShardOperation

    return DtensorShardOperation(like).shard_tensor(value)


def put_(target: Tensor, value: Any) -> None:
    """Copy a whole tensor, or a slice of a safetensors file, into `target`: of a sharded one, this rank's
    part. Not collective."""
    own = own_slice(target)
    if own.numel():
        with torch.no_grad():
            own.copy_(own_part(value, target))


def whole_of(own: Tensor | None, like: Tensor) -> Tensor:
    """The whole of something that is split as `like` is, from each rank's part; None where that is empty."""
    if not is_sharded(like):
        assert own is not None, "only of a slice can nothing be left"
        return own
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    part = own_slice(like).new_zeros(own_slice(like).shape) if own is None else own
    gathered = DTensor.from_local(
        part.contiguous(),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=tuple(sharded.stride()),
    )
    return gathered.full_tensor()


def holders(tensor: Tensor) -> int:
    """How many ranks of a sharded tensor's mesh hold the same part: 1 unless it is whole on them, as the bias
    behind a layer whose input is split."""
    mesh, placements = tensor.device_mesh, tensor.placements
    return math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_replicate())


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP gathers and frees the weights of this module itself."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def shard_modules(model: nn.Module) -> list[Any]:
    """Modules whose weights are gathered together, in the model's order."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free what a pass left gathered: the last group stays so after a pass without a backward pass."""
    for module in shard_modules(model):
        module.reshard()


def gather_gradients(model: nn.Module) -> None:
    """Let weights that were frozen in earlier passes have gradients from now on: FSDP notes which dtype it
    reduces when a group is first gathered."""
    for module in shard_modules(model):
        module.unshard()
        module.reshard()


def load_weights(model_class: Any, base_path: str, shards: int, how: dict[str, Any]) -> PreTrainedModel:
    """`from_pretrained`; with shards onto the meta device, sharded there, then each rank reads its slices.

    Args:
        model_class: of the causal model.
        shards: size of the process group, which exists already.
        how: further arguments of `from_pretrained`.

    transformers (5.19, `distributed/fsdp.py`) shards by the plan of the architecture and reads by slices of
    safetensors (`DtensorShardOperation`).

    Raises:
        UserError: the plan doesn't shard this architecture by layer.
    """
    if shards > 1:
        from transformers.distributed import DistributedConfig

        how = {**how, "distributed_config": DistributedConfig(fsdp_size=shards)}
    model = model_class.from_pretrained(base_path, use_safetensors=True, **how)
    return _ready(model) if shards > 1 else model


def shard_loaded(model: PreTrainedModel, shards: int) -> PreTrainedModel:
    """Shard a model that is whole on every rank already: fresh weights, which are drawn in one sequence.

    Raises:
        UserError: as `load_weights`.
    """
    from transformers.distributed import DistributedConfig

    config, _, mesh = model.prepare_distribute_model(DistributedConfig(fsdp_size=shards))
    model = model.maybe_distribute_model(model, config, mesh)
    model.tie_weights()
    return _ready(model)


def shard_with_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Shard parameters that were added to a sharded model, an adapter's, each gathered with its layer.

    FSDP2 has no public way to add to a module that it has; this makes a further group of the module's own
    kind, as `fully_shard` does where parameters have meshes of their own.

    Raises:
        UserError: a torch whose FSDP2 is built otherwise than that of 2.13.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    wanted = {id(p) for p in parameters.values()}
    root, *modules = shard_modules(model)
    for module in modules:
        members = [p for p in module.parameters() if id(p) in wanted]
        if not members:
            continue
        state = module._get_fsdp_state()
        like = state._fsdp_param_groups[0]
        group = FSDPParamGroup(
            members,
            (module,),
            like.mesh_info,
            like.post_forward_mesh_info,
            like.device,
            None,
            like.mp_policy,
            like.offload_policy,
        )
        _sum(group)
        state._fsdp_param_groups.append(group)
    root._get_fsdp_state()._init_shared_state()
    for module in modules:
        module._get_fsdp_state()._fsdp_param_groups[-1].lazy_init()


def _ready(model: Any) -> PreTrainedModel:
    # The root, the layers, and what lies around them.
    if len(shard_modules(model)) <= model.config.num_hidden_layers + 1:
        raise UserError(
            f"sharding: transformers has no plan that shards {model.config.model_type} by layer, so that "
            "each pass would gather it whole; set sharding: none"
        )
    for module in shard_modules(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            _sum(group)
    # save_pretrained and PEFT look at these, and would gather the whole base to save an adapter.
    model.config.distributed_config = None
    model._device_mesh = model._mesh_manager = model._tp_size = model._fsdp_size = None
    model._is_distributed_loading_by_transformers = False
    return model


def _sum(group: Any) -> None:
    """Gradients are added up over ranks, not averaged: losses here divide by totals of the global batch."""
    group.gradient_divide_factor = 1.0
    group.force_sum_reduction_for_comms = True

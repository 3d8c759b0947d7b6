"""Sharding of a base by torch's `fully_shard` (FSDP2), one group of weights per layer.

A sharded weight is a DTensor outside the forward pass of its layer and a plain tensor inside. While it loads,
no rank holds more than its slices and one layer of the checkpoint.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actors.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_AROUND = "_raylign_around"
"""Attribute of a sharded module: what runs around it (`_Around`)."""


def is_sharded(tensor: Tensor) -> bool:
    """True where this rank holds a slice only."""
    # Asking imports nothing: where nothing has made a DTensor, there is none.
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its slices, without gradient. Collective where it is sharded: every rank has to
    call it, in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_slice(tensor: Tensor) -> Tensor:
    """This rank's part, in the same storage; all of a tensor that is not sharded."""
    part: Any = tensor.detach()
    if is_sharded(part):
        with torch.no_grad():  # Otherwise a view, which autograd watches.
            part = part.to_local()
    own: Tensor = part
    return own


def split_dims(tensor: Tensor) -> set[int]:
    """Dimensions along which ranks hold parts of a tensor; empty where it is whole."""
    if not is_sharded(tensor):
        return set()
    placements: Any = tensor.placements
    return {p.dim % tensor.ndim for p in placements if not p.is_replicate()}


def own_part(value: Any, like: Tensor) -> Tensor:
    """The part of a whole tensor, or of a slice of a safetensors file, that this rank holds where it is split
    as `like` is. Not collective."""
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
    """Number of ranks of a sharded tensor's mesh with the same part: 1 unless it is whole on them, as the
    bias behind a layer whose input is split."""
    mesh, placements = tensor.device_mesh, tensor.placements
    return math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_replicate())


def is_managed(module: nn.Module) -> bool:
    """True where FSDP gathers and frees the weights of this module itself."""
    # As above: what imports nothing costs nothing.
    found = sys.modules.get("torch.distributed.fsdp")
    return found is not None and isinstance(module, found.FSDPModule)


def shard_modules(model: nn.Module) -> list[Any]:
    """Modules whose weights are gathered together, in the model's order."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free what a pass left gathered: the last group stays so after a pass without a backward pass."""
    for module in shard_modules(model):
        module.reshard()
        for part in module.__dict__.get(_AROUND, ()):
            part.reshard()


def gather_gradients(model: nn.Module) -> None:
    """Let weights that were frozen in earlier passes have gradients from now on: FSDP notes which dtype it
    reduces when a group is first gathered."""
    for module in shard_modules(model):
        module.unshard()
        module.reshard()


def shard_layers(model: Any, mesh: DeviceMesh) -> None:
    """Split a model's weights by transformers' plan for its architecture; of those on the meta device only
    the shape is known.

    Args:
        model: the causal model.
        mesh: one dimension, the ranks that split it.

    Raises:
        UserError: the plan doesn't shard this architecture by layer.
    """
    from transformers.distributed import DistributedConfig
    from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism

    model.config.distributed_config = DistributedConfig()
    apply_fully_sharded_data_parallelism(model, _OneMesh(mesh))
    # save_pretrained and PEFT look at it, and would gather the whole base to save an adapter.
    model.config.distributed_config = None
    # The root, the layers, and what lies around them.
    if len(shard_modules(model)) <= model.config.num_hidden_layers + 1:
        raise UserError(
            f"sharding: transformers has no plan that shards {model.config.model_type} by layer, so that "
            "each pass would gather it whole; set sharding: none"
        )
    for module in shard_modules(model):
        _sum(module)


class _OneMesh:
    """A mesh for everything, as transformers asks for one."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def get_mesh(self, dims: object) -> DeviceMesh:
        return self._mesh


def shard_with_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Shard parameters that were added to a sharded model, an adapter's, each gathered with its layer.

    FSDP2 has no way to add to a module that it has sharded. So the adapter's part of a layer is a module of
    its own outside of the model, whose pass is the layer's: `fully_shard` gathers and frees it around that. A
    module above these parts has the model's pass for its own, so that FSDP begins and ends once in a pass.
    Collective.
    """
    from torch.distributed.fsdp import fully_shard, share_comm_ctx

    wanted = {id(p) for p in parameters.values()}
    root, *modules = shard_modules(model)
    parts: list[Any] = []
    for module in modules:
        owners = [m for m in module.modules() if wanted & {id(p) for p in m.parameters(recurse=False)}]
        if owners:
            others = {p for m in owners for p in m.parameters(recurse=False) if id(p) not in wanted}
            mesh = next(p for p in module.parameters() if is_sharded(p)).device_mesh
            part: Any = _Around(module, owners)
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=others)
            _sum(part)
            if not parts:
                # Its default is to prefetch what ran before it: embeddings, which a backward pass leaves out.
                part.set_modules_to_backward_prefetch([module])
            parts.append(part)
    if parts:
        adapter: Any = _Around(root, parts)
        fully_shard(adapter, mesh=mesh)
        adapter(_nothing)  # Makes it the root of its parts, before a pass of the model asks one of them.
        share_comm_ctx([root, adapter, *parts])


def _nothing() -> None:
    """A pass in which nothing is computed."""


class _Around(nn.Module):
    """Runs whenever another module does, with parts of its own to gather. They aren't registered with that
    module, whose state would have each tensor under two names."""

    def __init__(self, module: nn.Module, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        run: Any = self
        module.forward = functools.wraps(module.forward)(functools.partial(run, module.forward))
        module.__dict__.setdefault(_AROUND, []).append(self)

    def forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)


def _sum(module: Any) -> None:
    """Gradients are added up over ranks, not averaged: losses here divide by totals of the global batch."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)

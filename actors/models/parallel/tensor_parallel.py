"""Tensor parallel: a base split inside its layers, by transformers' plan for its architecture.

Some ranks hold one model together and compute the same rows: each has some attention heads and some columns
of every MLP, and outputs are summed over the ranks where a layer's second product ends. Embeddings and the
output head stay whole on every rank, so that tied ones stay tied and log-probabilities are made as without.

A split weight is a DTensor; what it computes with is the plain part of this rank. LoRA's A and B are whole
plain tensors everywhere, of which a rank uses the rows or columns that belong to its part: their gradients
are shares that have to be summed over the ranks. PEFT sees nothing of all this.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from actors.errors import UserError
from actors.models.parallel.fsdp import own_slice, split_dims

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_WHOLE = ("lm_head", "embed_tokens")
"""Last parts of names that keep their weights whole whatever the plan says."""
_OF_HEADS = re.compile(r"(.*\.self_attn)\.[qk]_norm$")
"""Norms of single heads, behind a projection whose rows are split: each rank's gradient is of its own heads.

transformers marks them as `replicated_with_grad_allreduce`, glm4_moe's not; that style's hook sums what has
been accumulated so far, once for each micro-batch. Here gradients are summed once a step."""
_SHARE = "_raylign_gradient_is_a_share"


def split_layers(model: Any, mesh: DeviceMesh) -> None:
    """In place of each weight of the plan this rank's part; of those on the meta device only the shape is
    known.

    Raises:
        UserError: transformers has no plan for this architecture, or one that the ranks can't share evenly.
    """
    from transformers.distributed.tensor_parallel import (
        apply_tensor_parallelism,
        replace_layer_number_by_wildcard,
    )

    plan = plan_of(model)
    if not plan:
        raise UserError(
            f"tensor_parallel_size: transformers has no plan that splits the layers of a "
            f"{model.config.model_type} model; set 1, and sharding: base or full to save memory"
        )
    apply_tensor_parallelism(model, mesh, plan)
    for name, parameter in model.named_parameters():
        for placement in getattr(parameter, "placements", ()):
            if not placement.is_replicate() and parameter.shape[placement.dim] % mesh.size():
                raise UserError(
                    f"tensor_parallel_size: {mesh.size()} ranks can't share {name} evenly, which is "
                    f"{tuple(parameter.shape)}"
                )
    for name, module in model.named_modules():
        style = plan.get(replace_layer_number_by_wildcard(name))
        if isinstance(module, nn.Linear) and style in _DIMS:
            setattr(module, _DIM, _DIMS[style])
        if style == "mla_kv_a_proj":
            setattr(module, _LATENT, (model.config.qk_rope_head_dim, mesh))
    for name, module in model.named_modules():
        found = _OF_HEADS.match(name)
        if found and split_dim(model.get_submodule(f"{found.group(1)}.q_proj")) == 0:
            setattr(module, _SHARE, True)
    # PEFT and save_pretrained look at it, and would split or gather by themselves.
    model._tp_plan = {}


def plan_of(model: PreTrainedModel) -> dict[str, str]:
    """transformers' plan for a model, without what stays whole here. Empty: there is none for its layers."""
    return {
        name: style
        for name, style in model.tp_plan.items()
        if name.rpartition(".")[2] not in _WHOLE and style != "replicated_with_grad_allreduce"
    }


def share_names(model: nn.Module) -> set[str]:
    """Names of whole parameters whose gradient on a rank is a share of the group's, to be summed."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            stack = module.get_param() if isinstance(module, ParamWrapper) else None
            if split_dim(module.get_base_layer()) is not None or (stack is not None and split_dims(stack)):
                found |= {
                    f"{name}.{n}"
                    for n, _ in module.named_parameters()
                    if "lora_" in n and "base_layer" not in n
                }
        elif getattr(module, _SHARE, False):
            found |= {f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)}
    return found


def split_dim(layer: nn.Module) -> int | None:
    """Of a linear layer's weight: 0 where ranks have rows of it and so parts of its output, 1 where they have
    columns and are given parts of its input; None where input and output are whole on every rank."""
    return getattr(layer, _DIM, None)


def own_span(layer: nn.Module) -> slice:
    """Rows or columns (`split_dim`) of a split linear layer's weight that this rank has."""
    weight: Any = layer.weight
    size = own_slice(weight).shape[split_dim(layer)]
    first = weight.device_mesh.get_local_rank() * size
    return slice(first, first + size)


def takes_over_latent(layer: nn.Module) -> bool:
    """Leave the output of DeepSeek's projection to keys' latent and rotary parts as it is, for its wrapper,
    which then has to apply `copy_latent_to_ranks`. False for any other layer."""
    if not hasattr(layer, _LATENT):
        return False
    layer.__dict__.pop("forward", None)
    return True


def copy_latent_to_ranks(layer: nn.Module, output: Tensor) -> Tensor:
    """`copy_to_ranks` of the rotary part alone: the latent part's own projection does it."""
    size, mesh = getattr(layer, _LATENT)
    latent, rotary = output.split([output.shape[-1] - size, size], dim=-1)
    return torch.cat([latent, copy_to_ranks(rotary, mesh)], dim=-1)


_LATENT = "_raylign_rotary_part"
_DIM = "_raylign_split_dim"
_DIMS = {"colwise": 0, "rowwise": 1}


def copy_to_ranks(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`x`, the same on all ranks, before each computes a part of a layer. Backward: a sum over ranks."""
    return _CopyToRanks.apply(x, mesh.get_group())


def reduce_from_ranks(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over ranks of what each has computed with its part of a layer. Backward: nothing is sent."""
    return _ReduceFromRanks.apply(x, mesh.get_group())


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same tensor to another branch.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

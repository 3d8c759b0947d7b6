"""LoRA on linear layers in one function: y = x W^T + s (x A^T) B^T with W frozen.

PEFT adds up three tensors of y's size, and autograd three of x's. Here the low-rank products are added in
place to the base's. Parameters, names and files stay PEFT's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from actors.models.parallel.fsdp import own_slice
from actors.models.parallel.tensor_parallel import (
    copy_latent_to_ranks,
    copy_to_ranks,
    own_span,
    reduce_from_ranks,
    split_dim,
    takes_over_latent,
)
from actors.models.quantization.quantised_tensor import QuantisedTensor

if TYPE_CHECKING:
    from peft import PeftModel

_PLAIN = (Tensor, nn.Parameter, QuantisedTensor)
"""Types of tensors that products take as they are."""


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x weight^T + scaling (x a^T) b^T.

    Shapes: x (..., in), weight (out, in) frozen, a (r, in), b (out, r) -> (..., out).
    """
    return _LoraLinear.apply(x, weight, a, b, scaling)


def wrap_linears(peft: PeftModel) -> None:
    """Let PEFT's linear layers run this way where they can; needed again after adding adapters."""
    for module in peft.modules():
        if type(module) is Linear and takes_over_latent(module.get_base_layer()):
            module.__class__ = _LatentLinear
        elif type(module) in (Linear, ParamWrapper) and split_dim(module.get_base_layer()) is not None:
            module.__class__ = _SplitLinear if type(module) is Linear else _SplitParamWrapper
        elif type(module) is Linear:
            module.__class__ = _FusedLinear
        elif type(module) is ParamWrapper and _is_quantised_linear(module):
            module.__class__ = _QuantisedParamWrapper


def _is_quantised_linear(layer: Any) -> bool:
    """True where PEFT's `target_parameters` name the quantised weight of a linear layer."""
    return layer.num_experts == 1 and isinstance(layer.get_param(), QuantisedTensor)


class _FusedLinear(Linear):
    """PEFT's wrapper of a linear layer; plain LoRA of one adapter on a frozen float32 weight runs fused."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or len(active) != 1 or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
        plain = all(type(layer) is nn.Linear and layer.bias is None for layer in (base, a, b))
        if not plain or name in self.lora_variant or base.weight.requires_grad:
            return super().forward(x)
        dropout = self.lora_dropout[name]
        drops = not isinstance(dropout, nn.Identity) and dropout.training
        tensors = (x, base.weight, a.weight, b.weight)
        if drops or any(t.dtype != torch.float32 or type(t) not in _PLAIN for t in tensors):
            return super().forward(x)
        return lora_linear(*tensors, self.scaling[name])


class _SplitLinear(Linear):
    """PEFT's wrapper of a linear layer that is split over ranks."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _split_forward(self, x, *args, **kwargs)


class _SplitParamWrapper(ParamWrapper):
    """The same where PEFT's `target_parameters` name the weight of such a layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _split_forward(self, x, *args, **kwargs)


class _QuantisedParamWrapper(ParamWrapper):
    """PEFT's wrapper of a linear layer's quantised weight: its W + BA would be kept in 16 or 32 bits."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        if self.disable_adapters or not any(name in self.lora_A for name in self.active_adapters):
            return base(x, *args, **kwargs)
        if args or kwargs or self.merged:
            raise NotImplementedError("a quantised layer has plain LoRA only")
        y = _product(self, x, base.weight, slice(None), slice(None))
        return y if base.bias is None else y + base.bias


def _split_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Each rank multiplies with its part of the base's weight, of A and of B, between one sum over ranks in
    the backward pass and one in the forward pass."""
    if layer.disable_adapters or not any(name in layer.lora_A for name in layer.active_adapters):
        return layer.base_layer(x, *args, **kwargs)
    if args or kwargs or layer.merged or layer.lora_variant:
        raise NotImplementedError("a layer that is split over ranks has plain LoRA only")
    base = layer.get_base_layer()
    mesh, weight, span = base.weight.device_mesh, own_slice(base.weight), own_span(base)
    if split_dim(base) == 0:
        y = _product(layer, copy_to_ranks(x, mesh), weight, slice(None), span)
    else:
        y = reduce_from_ranks(_product(layer, x, weight, span, slice(None)), mesh)
    return y if base.bias is None else y + own_slice(base.bias)


def _product(layer: Any, x: Tensor, weight: Tensor, columns: slice, rows: slice) -> Tensor:
    """x weight^T and the active adapters' s (x A^T) B^T, of A these columns and of B these rows."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    factors = [(layer.lora_A[n].weight[:, columns], layer.lora_B[n].weight[rows]) for n in active]
    dropouts = [layer.lora_dropout[n] for n in active]
    drops = any(isinstance(d, nn.Dropout) and d.training for d in dropouts)
    if len(active) == 1 and not drops and all(t.dtype == torch.float32 for t in (x, weight, *factors[0])):
        return lora_linear(x, weight, *factors[0], layer.scaling[active[0]])
    y = linear(x, weight)
    for name, (a, b), dropout in zip(active, factors, dropouts, strict=True):
        low = linear(dropout(x).to(a.dtype), a)
        y = y + (linear(low, b) * layer.scaling[name]).to(y.dtype)
    return y


class _LatentLinear(_FusedLinear):
    """PEFT's wrapper of a projection that is whole on every rank, but whose output's last part goes straight
    to the heads of each: gradients of that part are shares, for A and B as for the base."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return copy_latent_to_ranks(self.base_layer, super().forward(x, *args, **kwargs))


# PEFT and its users know the layers by these names.
_FusedLinear.__name__ = _SplitLinear.__name__ = _LatentLinear.__name__ = "Linear"
_SplitParamWrapper.__name__ = _QuantisedParamWrapper.__name__ = "ParamWrapper"


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = torch.mm(rows, a.t())
        y = torch.mm(rows, weight.t()).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        d_low = torch.mm(grad, b).mul_(ctx.scaling)
        da = torch.mm(d_low.t(), rows) if ctx.needs_input_grad[2] else None
        db = torch.mm(grad.t(), low * ctx.scaling) if ctx.needs_input_grad[3] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(grad, weight).addmm_(d_low, a).view_as(x)
        return dx, None, da, db, None

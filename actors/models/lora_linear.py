"""LoRA on linear layers in one function: y = x W^T + s (x A^T) B^T with W frozen.

PEFT adds up three tensors of y's size, and autograd three of x's. Here the low-rank products are added in
place to the base's. Parameters, names and files stay PEFT's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from peft import PeftModel


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x weight^T + scaling (x a^T) b^T.

    Shapes: x (..., in), weight (out, in) frozen, a (r, in), b (out, r) -> (..., out).
    """
    return _LoraLinear.apply(x, weight, a, b, scaling)


def wrap_linears(peft: PeftModel) -> None:
    """Let PEFT's linear layers run this way where they can; needed again after adding adapters."""
    for module in peft.modules():
        if type(module) is Linear:
            module.__class__ = _FusedLinear


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
        if drops or any(t.dtype != torch.float32 or type(t) not in (Tensor, nn.Parameter) for t in tensors):
            return super().forward(x)
        return lora_linear(*tensors, self.scaling[name])


# PEFT and its users know the layer by this name.
_FusedLinear.__name__ = "Linear"


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

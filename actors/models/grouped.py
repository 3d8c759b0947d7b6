"""Products of rows grouped by expert, with gradients for LoRA factors only.

For the CPU. The expert weights are frozen, so no gradient of theirs is made; rows are brought to their
experts and back by gathering alone, in the backward pass too, which is deterministic on any number of
threads; torch's own backward of an index is slow in that mode. Each function has a plain autograd
counterpart in tests/actors/models/test_grouped.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block (1 MiB of float32) that is made, read and dropped while it is in the cache."""


@dataclass(frozen=True)
class Routes:
    """Which expert each of N tokens' k choices goes to; S = N * k rows stand sorted by expert."""

    token: Tensor
    """int64 (S,): the token that a sorted row belongs to."""
    order: Tensor
    """int64 (S,): the choice (token * k + place) that a sorted row is."""
    choices: tuple[Tensor, ...]
    """k of int64 (N,): where each token's choice of that place stands among the sorted rows."""
    back: Tensor
    """int64 (S,): where each choice stands among the sorted rows."""
    sizes: list[int]
    """Rows of each expert."""

    @staticmethod
    def of(top_k_index: Tensor, n_experts: int) -> Routes:
        """From int64 (N, k) experts."""
        k = top_k_index.shape[1]
        flat = top_k_index.reshape(-1)
        # The sort that transformers uses: products of rows in another order differ in the last bits.
        order = torch.sort(flat).indices
        back = torch.argsort(order)
        sizes = torch.bincount(flat, minlength=n_experts).tolist()
        choices = tuple(back[place::k].contiguous() for place in range(k))
        return Routes(order // k, order, choices, back, sizes)


def sorted_rows(hidden: Tensor, routes: Routes) -> Tensor:
    """(N, H) -> (S, H): each token once per choice, sorted by expert."""
    return _SortedRows.apply(hidden, routes)


def grouped_lora(
    x: Tensor, weight: Tensor, routes: Routes, a: Tensor | None, b: Tensor | None, scaling: float
) -> Tensor:
    """Per expert e: x W_e^T + scaling (x A_e^T) B_e^T, or without the second term.

    Shapes: x (S, in), weight (E, out, in) frozen, a (E, r, in), b (E, out, r) -> (S, out).
    """
    return _GroupedLora.apply(x, weight, routes, a, b, scaling)


def combined(y: Tensor, weights: Tensor, routes: Routes) -> Tensor:
    """(S, H) sorted rows and (N, k) weights -> (N, H): each token's rows, weighted and added up."""
    return _Combined.apply(y, weights, routes)


class _SortedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return hidden.index_select(0, routes.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        first, *others = ctx.routes.choices
        total = grad.index_select(0, first)
        for choice in others:
            total += grad.index_select(0, choice)
        return total, None


class _GroupedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        routes: Routes,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
    ) -> Tensor:
        y = x.new_empty(len(x), weight.shape[1])
        low = None if a is None else x.new_empty(len(x), a.shape[1])
        for e, xe, ye, le in _groups(routes.sizes, x, y, low):
            torch.mm(xe, weight[e].t(), out=ye)
            if a is not None and b is not None:
                torch.mm(xe, a[e].t(), out=le)
                ye.addmm_(le, b[e].t(), alpha=scaling)
        ctx.save_for_backward(x if a is not None else None, weight, a, b, low)
        ctx.sizes, ctx.scaling = routes.sizes, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad = grad.contiguous()
        dx = grad.new_empty(len(grad), weight.shape[2]) if ctx.needs_input_grad[0] else None
        if low is None:
            for e, ge, de in _groups(ctx.sizes, grad, dx):
                torch.mm(ge, weight[e], out=de)
            return dx, None, None, None, None, None
        # An expert without rows keeps a gradient of zero.
        da, db, d_low = torch.zeros_like(a), torch.zeros_like(b), torch.empty_like(low)
        for e, ge, de, xe, le, dle in _groups(ctx.sizes, grad, dx, x, low, d_low):
            torch.mm(ge, b[e], out=dle)
            dle.mul_(ctx.scaling)
            torch.mm(dle.t(), xe, out=da[e])
            torch.addmm(db[e], ge.t(), le, beta=0, alpha=ctx.scaling, out=db[e])
            if de is not None:
                torch.mm(ge, weight[e], out=de)
                de.addmm_(dle, a[e])
        return dx, None, None, da, db, None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        ctx.save_for_backward(y, weights)
        ctx.routes = routes
        n, k = weights.shape
        total = y.new_empty(n, y.shape[1])
        tokens = max(1, BLOCK_ELEMENTS // (k * y.shape[1]))
        # The arithmetic of transformers' grouped_mm_experts_forward, to the bit, but block by block.
        for out, weight, back in zip(
            total.split(tokens), weights.split(tokens), routes.back.split(tokens * k), strict=True
        ):
            rows = y.index_select(0, back).view(-1, k, y.shape[1])
            torch.sum(rows.mul_(weight[:, :, None]), dim=1, out=out)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, weights = ctx.saved_tensors
        routes: Routes = ctx.routes
        grad = grad.contiguous()
        dy = dw = None
        if ctx.needs_input_grad[0]:
            dy = grad.index_select(0, routes.token)
            dy.mul_(weights.reshape(-1).index_select(0, routes.order)[:, None])
        if ctx.needs_input_grad[1]:
            dots = [torch.linalg.vecdot(grad, y.index_select(0, choice)) for choice in routes.choices]
            dw = torch.stack(dots, dim=1)
        return dy, dw, None


def _groups(sizes: list[int], *tensors: Tensor | None) -> Any:
    """(expert, its rows of each tensor) for every expert that has rows."""
    split = [[None] * len(sizes) if t is None else t.split(sizes) for t in tensors]
    return (group for group in zip(range(len(sizes)), *split, strict=True) if sizes[group[0]])

"""Gated expert MLP over rows grouped by expert, with gradients for LoRA factors, inputs and route weights.

For the CPU. The experts' own weights are frozen and get no gradient. Each expert's rows go through the whole
MLP on one thread (`actors.models.threads`), gathered, multiplied and gated while they are in its cache;
experts share nothing, so any number of threads gives the same bits. Each row's gate and up values and its
low-rank products are kept for the backward pass, nothing of the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, silu

from actors.models import threads as workers


class LowRank(NamedTuple):
    """The low-rank term scaling * (x A_e^T) B_e^T of each expert e."""

    a: Tensor
    """(E, r, in)."""
    b: Tensor
    """(E, out, r)."""
    scaling: float


@dataclass(frozen=True)
class Routes:
    """Routes of M tokens to k experts each, as S rows, one for each choice, sorted by expert.

    S is M * k, or less where some choices are of experts that other ranks hold.
    """

    token: Tensor
    """int64 (S,): the token (of all N) that a sorted row belongs to."""
    order: Tensor
    """int64 (S,): the choice (token * k + place, of the M) that a sorted row is."""
    back: Tensor
    """int64 (M, k): place of each choice among the sorted rows; 0 for those of other ranks."""
    spans: list[tuple[int, int]]
    """First row and end (exclusive) of each expert's rows."""
    wanted: Tensor | None
    """int64 (M,): tokens that are computed; None: all N."""
    here: Tensor | None = None
    """float32 (M, k): 0 for choices of other ranks' experts, 1 for own ones; None: all are own."""

    @staticmethod
    def of(top_k_index: Tensor, n_experts: int, wanted: Tensor | None = None) -> Routes:
        """From int64 (N, k) experts of all tokens. `wanted`: as of the field."""
        k = top_k_index.shape[1]
        flat = (top_k_index if wanted is None else top_k_index.index_select(0, wanted)).reshape(-1)
        # The sort that transformers uses: products of rows in another order differ in the last bits.
        order = torch.sort(flat).indices
        token = order // k
        ends = torch.bincount(flat, minlength=n_experts).cumsum(0).tolist()
        return Routes(
            token if wanted is None else wanted.index_select(0, token),
            order,
            torch.argsort(order).view(-1, k),
            list(zip([0, *ends], ends)),
            wanted,
        )

    @staticmethod
    def of_some(top_k_index: Tensor, n_experts: int) -> Routes:
        """The same where -1 stands for an expert of another rank."""
        k = top_k_index.shape[1]
        flat = top_k_index.reshape(-1)
        elsewhere = int((flat < 0).sum())
        order = torch.sort(flat).indices[elsewhere:]
        back = torch.zeros_like(flat)
        back[order] = torch.arange(len(order), device=flat.device)
        ends = torch.bincount(flat[order], minlength=n_experts).cumsum(0).tolist()
        here = (top_k_index >= 0).float()
        return Routes(order // k, order, back.view(-1, k), list(zip([0, *ends], ends)), None, here)

    def by_size(self) -> list[int]:
        """Experts that have rows, most rows first: threads then end at nearly the same time."""
        sizes = [end - first for first, end in self.spans]
        return sorted((e for e, size in enumerate(sizes) if size), key=lambda e: -sizes[e])

    def added_up(self, rows: Tensor, weights: Tensor | None, n_tokens: int) -> Tensor:
        """(S, H) sorted rows -> (N, H): each token's rows, weighted by (M, k) weights, added up.

        Weights of choices of other ranks have to be zero.
        """
        if not len(rows):
            return rows.new_zeros((n_tokens, rows.shape[1]))
        weights = self.here if weights is None else weights
        total = embedding_bag(self.back, rows, per_sample_weights=weights, mode="sum")
        return total if self.wanted is None else _placed(total, self.wanted, n_tokens)


def expert_mlp(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routes: Routes,
    of_gate_up: LowRank | None = None,
    of_down: LowRank | None = None,
) -> Tensor:
    """Each token's mixture of its experts' down(silu(gate(x)) * up(x)).

    Args:
        hidden: (N, H).
        weights: (N, k), of each token's choices.
        gate_up: (E, 2 I, H), frozen; the gate's rows first.
        down: (E, H, I), frozen.
        routes: of those choices.
        of_gate_up: LoRA added to `gate_up`.
        of_down: LoRA added to `down`.

    Returns:
        (N, H); zero for tokens that `routes` leaves out.
    """
    a1, b1, s1 = of_gate_up or (None, None, 1.0)
    a2, b2, s2 = of_down or (None, None, 1.0)
    return _ExpertMlp.apply(hidden, weights, gate_up, down, a1, b1, a2, b2, routes, (s1, s2))


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        routes: Routes,
        scalings: tuple[float, float],
    ) -> Tensor:
        n_rows, inner = len(routes.token), down.shape[2]
        both = hidden.new_empty(n_rows, gate_up.shape[1])
        y = hidden.new_empty(n_rows, hidden.shape[1])
        low1, low2 = (None if a is None else hidden.new_empty(n_rows, a.shape[1]) for a in (a1, a2))

        def work(e: int) -> None:
            rows = slice(*routes.spans[e])
            gated = both[rows]
            x = hidden.index_select(0, routes.token[rows])
            _product(x, gate_up[e], _of(a1, e), _of(b1, e), scalings[0], gated, _of(low1, rows))
            act = silu(gated[:, :inner]).mul_(gated[:, inner:])
            _product(act, down[e], _of(a2, e), _of(b2, e), scalings[1], y[rows], _of(low2, rows))

        workers.each(routes.by_size(), work)
        ctx.save_for_backward(hidden, weights, gate_up, down, a1, b1, a2, b2, both, low1, low2)
        ctx.routes, ctx.scalings = routes, scalings
        kept = weights if routes.wanted is None else weights.index_select(0, routes.wanted)
        return routes.added_up(y, kept, len(hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights, gate_up, down, a1, b1, a2, b2, both, low1, low2 = ctx.saved_tensors
        routes: Routes = ctx.routes
        s1, s2 = ctx.scalings
        grad = grad.contiguous()
        n_rows, inner = len(routes.token), down.shape[2]
        by_row = _picked_weights(weights, routes)[:, None]
        dw = grad.new_empty(n_rows)
        dx = grad.new_empty(n_rows, hidden.shape[1]) if ctx.needs_input_grad[0] else None
        # An expert without rows keeps a gradient of zero.
        by_factor: list[Any] = [None if t is None else torch.zeros_like(t) for t in (a1, b1, a2, b2)]
        da1, db1, da2, db2 = by_factor

        def work(e: int) -> None:
            rows = slice(*routes.spans[e])
            token, weight, gated = routes.token[rows], by_row[rows], both[rows]
            gate, up = gated[:, :inner], gated[:, inner:]
            opened = silu(gate)
            act = opened * up
            g = grad.index_select(0, token)
            # Without the routes' weights at first, so that the gradient of theirs is <d_act, act>.
            d_low = None if low2 is None else torch.mm(g, b2[e]).mul_(s2)
            d_act = torch.mm(g, down[e])
            if d_low is not None:
                d_act.addmm_(d_low, a2[e])
            torch.linalg.vecdot(d_act, act, out=dw[rows])
            d_act.mul_(weight)
            if d_low is not None:
                torch.mm(d_low.mul_(weight).t(), act, out=da2[e])
                torch.mm(g.t(), (low2[rows] * weight).mul_(s2), out=db2[e])
            d_gated = torch.empty_like(gated)
            torch.mul(d_act, opened, out=d_gated[:, inner:])
            d_gated[:, :inner] = torch.ops.aten.silu_backward(d_act.mul_(up), gate)
            d_low = None if low1 is None else torch.mm(d_gated, b1[e]).mul_(s1)
            if d_low is not None:
                torch.mm(d_low.t(), hidden.index_select(0, token), out=da1[e])
                torch.mm(d_gated.t(), low1[rows] * s1, out=db1[e])
            if dx is not None:
                torch.mm(d_gated, gate_up[e], out=dx[rows])
                if d_low is not None:
                    dx[rows].addmm_(d_low, a1[e])

        workers.each(routes.by_size(), work)
        d_hidden = None if dx is None else routes.added_up(dx, None, len(hidden))
        d_weights = None
        if ctx.needs_input_grad[1]:
            d_weights = _by_choice(dw, routes)
            if routes.wanted is not None:
                d_weights = _placed(d_weights, routes.wanted, len(weights))
        return d_hidden, d_weights, None, None, *by_factor, None, None


def _product(
    x: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    y: Tensor,
    low: Tensor | None,
) -> None:
    """y = x weight^T + scaling (x a^T) b^T, with low = x a^T."""
    torch.mm(x, weight.t(), out=y)
    if a is not None and b is not None and low is not None:
        torch.mm(x, a.t(), out=low)
        y.addmm_(low, b.t(), alpha=scaling)


def _of(stack: Tensor | None, at: int | slice) -> Tensor | None:
    return None if stack is None else stack[at]


def _picked_weights(weights: Tensor, routes: Routes) -> Tensor:
    """(N, k) -> (S,): each sorted row's."""
    kept = weights if routes.wanted is None else weights.index_select(0, routes.wanted)
    return kept.reshape(-1).index_select(0, routes.order)


def _by_choice(by_row: Tensor, routes: Routes) -> Tensor:
    """(S,) -> (M, k); zero for choices of other ranks."""
    if not len(by_row):
        return by_row.new_zeros(routes.back.shape)
    found = by_row.index_select(0, routes.back.view(-1)).view_as(routes.back)
    return found if routes.here is None else found.mul_(routes.here)


def _placed(rows: Tensor, at: Tensor, n: int) -> Tensor:
    """(M, ...) -> (n, ...) with rows at `at` and zeros elsewhere."""
    whole = rows.new_zeros((n, *rows.shape[1:]))
    whole[at] = rows
    return whole

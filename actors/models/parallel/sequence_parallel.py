"""Sequence parallel: ranks that share out a row's positions, and heads while they attend (Ulysses,
arXiv 2309.14509).

Each rank holds a whole model and computes its own positions. Before attention an all-to-all gives it all
positions of some heads, after it another one gives it all heads of its own positions. Gradients go the same
ways backwards, so that each rank's gradient of a weight is a share, to be summed. Every call is collective,
with as many positions on each rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """All positions of this rank's share of the heads, from its C positions of all heads.

    Key heads that the ranks can't share evenly are repeated first, as often as that takes.

    Shapes: (C, heads, D) -> (ranks * C, heads / ranks, D), of each; D is the same.
    """
    repeats = _repeats(query.shape[1], key.shape[1], dist.get_world_size(group))
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return _ToHeads.apply(query, key, value, group)


def to_positions(output: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All heads of this rank's positions: (ranks * C, heads / ranks, D) -> (C, heads, D)."""
    return _ToPositions.apply(output, group)


def own_heads(of_heads: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(heads,) -> (heads / ranks,): those that this rank attends with."""
    return of_heads.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def of_all_ranks(own: Tensor, places: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """(n, ...) rows of this rank at int64 (n,) `places`, each of which one rank has -> (size, ...) of all.

    What is made of them has to be the same on every rank: the gradient of a rank's own rows is that rank's.
    """
    return _OfAllRanks.apply(own, places, size, group)


def _repeats(heads: int, key_heads: int, ranks: int) -> int:
    fewest = ranks // math.gcd(key_heads, ranks)
    return fewest if (heads // key_heads) % fewest == 0 else heads // key_heads


def _heads_out(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(C, ranks, h, D), heads by rank -> (ranks * C, h, D)."""
    sent = x.transpose(0, 1).contiguous()
    found = torch.empty_like(sent)
    dist.all_to_all_single(found, sent, group=group)
    return found.flatten(0, 1)


def _positions_out(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks * C, h, D) -> (C, ranks, h, D)."""
    sent = x.contiguous()
    found = torch.empty_like(sent)
    dist.all_to_all_single(found, sent, group=group)
    return found.unflatten(0, (dist.get_world_size(group), -1)).transpose(0, 1)


# One message for queries, keys and values: in the backward pass no rank can send them in another order.
class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        ranks = dist.get_world_size(group)
        ctx.group, ctx.sizes = group, [x.shape[1] // ranks for x in (query, key, value)]
        by_rank = [x.unflatten(1, (ranks, -1)) for x in (query, key, value)]
        parts = _heads_out(torch.cat(by_rank, dim=2), group).split(ctx.sizes, dim=1)
        return tuple(x.contiguous() for x in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_rank = _positions_out(torch.cat(grads, dim=1), ctx.group).split(ctx.sizes, dim=2)
        return *(x.flatten(1, 2) for x in by_rank), None


class _ToPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _positions_out(output, group).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _heads_out(grad.unflatten(1, (dist.get_world_size(ctx.group), -1)), ctx.group), None


class _OfAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(places)
        found = own.new_zeros((size, *own.shape[1:]))
        found[places] = own
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None, None

"""Rows picked from rows, with a backward pass that gathers too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from actors.batches.gathering import Gathering


class Gather(NamedTuple):
    """`actors.batches.gathering.Gathering` as tensors: M rows picked from N."""

    index: Tensor
    """int64 (M,)."""
    readers: tuple[Tensor, ...]
    """Of int64 (R, k) each."""
    order: Tensor | None
    """int64 (N,)."""

    @staticmethod
    def of(gathering: Gathering, device: torch.device) -> Gather:
        index, *readers = (torch.from_numpy(x).to(device) for x in (gathering.index, *gathering.readers))
        order = None if gathering.order is None else torch.from_numpy(gathering.order).to(device)
        return Gather(index, tuple(readers), order)


def picked(rows: Tensor, gather: Gather | None) -> Tensor:
    """(N, ...) -> (M, ...); None: the rows as they are."""
    return rows if gather is None else _Picked.apply(rows, gather)


class _Picked(torch.autograd.Function):
    """index_select whose backward pass gathers too.

    torch's adds rows up one by one, which its deterministic mode does on one thread: a fifth of the time of
    a training step of short sequences at hidden 128.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return rows.index_select(0, gather.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sums = [_sum_of_picks(grad, picks) for picks in ctx.gather.readers]
        total = sums[0] if len(sums) == 1 else torch.cat(sums)
        return total if ctx.gather.order is None else total.index_select(0, ctx.gather.order), None


def _sum_of_picks(grad: Tensor, picks: Tensor) -> Tensor:
    """(M, ...) by int64 (R, k) -> (R, ...)."""
    if picks.shape[1] == 1:
        return grad.index_select(0, picks[:, 0])
    return grad.index_select(0, picks.reshape(-1)).unflatten(0, picks.shape).sum(1)

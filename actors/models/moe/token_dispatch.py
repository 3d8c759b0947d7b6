"""Dispatch of tokens to the experts of other ranks, and return of the experts' outputs (all-to-all).

Each rank holds some experts of every layer and has tokens of its own. A token is sent once to every rank that
holds an expert of its choice, with the weights of its choices there, and comes back as one row: the mixture
of these experts. Gradients go the same ways backwards. Every call is collective: all ranks have to make it,
with any number of tokens, and the backward pass too where any rank wants gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from actors.models.parallel.fsdp import is_sharded, own_slice


@dataclass(frozen=True)
class TokenDispatch:
    """The exchange of one layer: S tokens that this rank sends, M that it receives, with k choices each."""

    experts: Tensor
    """int64 (M, k): choices of the received tokens, counted from this rank's first expert; -1: one of another
    rank."""
    token: Tensor
    """int64 (S,): index of each sent token among this rank's, ordered by receiving rank."""
    there: Tensor
    """bool (S, k): choices whose expert the receiving rank holds."""
    sent: list[int]
    """Tokens sent to each rank."""
    received: list[int]
    """Tokens received from each rank."""
    n_tokens: int
    """Tokens of this rank, sent or not."""
    group: dist.ProcessGroup

    @staticmethod
    def of(
        top_k_index: Tensor, n_experts: int, group: dist.ProcessGroup, wanted: Tensor | None = None
    ) -> TokenDispatch:
        """From int64 (N, k) experts of this rank's tokens; `wanted`, int64: only these tokens are sent."""
        index = top_k_index if wanted is None else top_k_index.index_select(0, wanted)
        ranks = dist.get_world_size(group)
        each = n_experts // ranks
        owner = index // each
        goes = torch.zeros((ranks, len(index)), dtype=torch.bool, device=index.device)
        goes.scatter_(0, owner.t(), True)
        rank, token = goes.nonzero(as_tuple=True)
        there = owner.index_select(0, token) == rank[:, None]
        experts = (index.index_select(0, token) - rank[:, None] * each).masked_fill(~there, -1)
        n_sent = goes.sum(dim=1)
        n_received = torch.empty_like(n_sent)
        dist.all_to_all_single(n_received, n_sent, group=group)
        sent, received = torch.stack([n_sent, n_received]).tolist()
        return TokenDispatch(
            _exchanged(experts, sent, received, group),
            token if wanted is None else wanted.index_select(0, token),
            there,
            sent,
            received,
            len(top_k_index),
            group,
        )

    def send(self, hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Send (N, H) tokens and the (N, k) weights of their choices; returns (M, H) and (M, k) of the
        received ones, with a weight of zero where `experts` is -1."""
        return _Send.apply(hidden, weights, self)

    def combine(self, mixed: Tensor) -> Tensor:
        """Send (M, H) outputs back; returns (N, H): the sum over ranks for each own token, zero for one that
        was not sent."""
        return _Combine.apply(mixed, self)

    def send_rows(self, rows: Tensor) -> Tensor:
        """All-to-all of the sent tokens' rows: (S, .) -> (M, .)."""
        return _exchanged(rows, self.sent, self.received, self.group)

    def combine_rows(self, rows: Tensor) -> Tensor:
        """All-to-all in the other direction: (M, .) -> (N, .), added up in the order of ranks."""
        rows = _exchanged(rows, self.received, self.sent, self.group)
        total = torch.zeros(
            (self.n_tokens, *rows.shape[1:]),
            dtype=torch.promote_types(rows.dtype, torch.float32),
            device=rows.device,
        )
        # Rows from one rank are of different tokens, so that the order of additions is fixed.
        for at, part in zip(self.token.split(self.sent), rows.split(self.sent), strict=True):
            total.index_add_(0, at, part.to(total.dtype))
        return total.to(rows.dtype)


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    found = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found


# One autograd node per direction: no rank can leave out one of its two messages, or swap them.
class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, dispatch: TokenDispatch) -> tuple[Tensor, Tensor]:
        ctx.dispatch = dispatch
        sent_weights = weights.index_select(0, dispatch.token).masked_fill(~dispatch.there, 0)
        return dispatch.send_rows(hidden.index_select(0, dispatch.token)), dispatch.send_rows(sent_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor, d_weights: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: TokenDispatch = ctx.dispatch
        by_hidden = dispatch.combine_rows(d_hidden) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return by_hidden, None, None
        # A choice's weight has a gradient from the rank that holds the expert, and from no other.
        here = dispatch.experts >= 0
        return by_hidden, dispatch.combine_rows(d_weights.masked_fill(~here, 0)), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, dispatch: TokenDispatch) -> Tensor:
        ctx.dispatch = dispatch
        return dispatch.combine_rows(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        dispatch: TokenDispatch = ctx.dispatch
        return dispatch.send_rows(grad.index_select(0, dispatch.token)), None


class OwnExperts:
    """The experts that this rank holds of a layer, as an experts implementation reads a whole module."""

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts
        for name, parameter in experts.named_parameters(recurse=False):
            if not is_sharded(parameter):
                continue
            whole: Any = parameter
            setattr(self, name, whole.to_local() if whole.requires_grad else own_slice(whole))
            self.num_experts = len(own_slice(whole))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

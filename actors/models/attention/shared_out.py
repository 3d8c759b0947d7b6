"""Attention of a row whose positions ranks share out: each attends with some heads to all of it."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from actors.models.attention.grouped import GroupedSequences, as_wide_as
from actors.models.attention.varlen import VarlenSequences
from actors.models.parallel.sequence_parallel import own_heads, to_heads, to_positions


class SharedOutSequences(NamedTuple):
    """The sequences of the whole row, and the ranks that have its positions."""

    whole: GroupedSequences | VarlenSequences
    ranks: dist.ProcessGroup

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """As of the others, but of this rank's C positions: query (C, heads, D) -> (C, heads, D of value).

        Collective.
        """
        size = value.shape[-1]
        inputs = to_heads(query, key, as_wide_as(query, value), self.ranks)
        own = None if sinks is None else own_heads(sinks, self.ranks)
        output = self.whole.attend(*inputs, dropout, scaling, window, own)
        return to_positions(output, self.ranks)[..., :size]

"""One rank's part of a padding-free micro-batch whose positions several ranks share out.

Each has as many positions as the others, in the row's order; padding stands at the end, as a sequence of its
own. Attention is planned for the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from actors.batches.attention_plan import AttentionPlan
from actors.batches.packing import FREE, MicroBatch


@dataclass(frozen=True, kw_only=True)
class PositionShare(MicroBatch):
    """A micro-batch of which one rank has C positions.

    `input_ids`, `position_ids` and `real` are (1, C); `predictors`, `labels`, `last`, `experts` and `copies`
    those that are here. The rest is of the whole.
    """

    positions: np.ndarray
    """int64 (real ones,): places of this rank's real positions in the row."""
    counted: np.ndarray
    """int64 (labels,): which of the counted tokens the labels here are."""
    ends: np.ndarray
    """int64 (last,): sequences whose last token is here."""


def position_share(micro: MicroBatch, rank: int, ranks: int) -> MicroBatch:
    """The part of one of `ranks`; with one rank the micro-batch itself."""
    if ranks == 1:
        return micro
    assert micro.attention is not None, "positions of a padding-free row only are shared out"
    size = micro.input_ids.size
    each = -(-size // ranks)
    missing = each * ranks - size
    own = slice(rank * each, (rank + 1) * each)

    def here(whole: np.ndarray, padding: np.ndarray | int) -> np.ndarray:
        rest = np.broadcast_to(np.asarray(padding, dtype=whole.dtype), (missing, *whole.shape[1:]))
        return np.concatenate([whole, rest])[own]

    def found(places: np.ndarray) -> np.ndarray:
        return np.flatnonzero((places >= own.start) & (places < own.stop))

    real = here(micro.real.reshape(-1), 0)
    counted, ends = found(micro.predictors), found(micro.last)
    fields = {name: getattr(micro, name) for name in MicroBatch.__dataclass_fields__}
    return PositionShare(
        **fields
        | {
            "input_ids": here(micro.input_ids.reshape(-1), 0)[None],
            "position_ids": here(micro.position_ids.reshape(-1), np.arange(missing))[None],
            "real": real[None],
            "predictors": micro.predictors[counted] - own.start,
            "labels": micro.labels[counted],
            "last": micro.last[ends] - own.start,
            "attention": _with_padding(micro.attention, size, missing),
            "experts": None if micro.experts is None else here(micro.experts, FREE),
            "copies": None if micro.copies is None else here(micro.copies, 0),
        },
        positions=np.flatnonzero(real) + own.start,
        counted=counted,
        ends=ends,
    )


def _with_padding(plan: AttentionPlan, size: int, missing: int) -> AttentionPlan:
    if not missing:
        return plan
    return replace(
        plan,
        places=np.concatenate([plan.places, np.arange(size, size + missing)]),
        lengths=np.append(plan.lengths, missing),
        shared=np.append(plan.shared, 0),
    )

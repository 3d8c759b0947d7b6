"""Batches, in the form in which processes exchange them: numpy columns, offsets between sequences.

Ray's object store hands numpy arrays to every actor on a node without a copy, so a batch is put
there once and passed by reference. Torch tensors are made inside the model worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Batch:
    """Rows of one or more token sequences each.

    A row is what a loss is averaged over: one sequence for SFT, a (chosen, rejected) pair for
    preferences. Sequences of row `i` are `i * sequences_per_row ... + sequences_per_row - 1`.
    """

    token_ids: np.ndarray
    """int32 (tokens,): all sequences, one after the other."""
    loss_mask: np.ndarray
    """bool (tokens,): True where the token is a label whose log-probability counts. The first
    token of a sequence has no predictor and is never True."""
    offsets: np.ndarray
    """int64 (sequences + 1,): sequence `s` is `token_ids[offsets[s]:offsets[s + 1]]`."""
    sequences_per_row: int = 1
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Per-row values of shape (rows, ...), e.g. `ref_chosen_logps`."""
    token_columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Values of shape (counted tokens,), in the order of `loss_mask`, e.g. advantages."""
    experts: np.ndarray | None = None
    """uint8 or uint16 (tokens, layers, top_k): experts that a model which computes this batch has to use
    (`actors.batches.routed_experts`); None: its routers choose."""

    @property
    def n_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_rows(self) -> int:
        return self.n_sequences // self.sequences_per_row

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """int64 (sequences,)."""
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> np.ndarray:
        """int64 (sequences,): labels that count in each sequence."""
        cumulative = np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])
        return cumulative[self.offsets[1:]] - cumulative[self.offsets[:-1]]

    @staticmethod
    def from_sequences(
        token_ids: Sequence[ArrayLike],
        loss_masks: Sequence[ArrayLike],
        sequences_per_row: int = 1,
        columns: dict[str, np.ndarray] | None = None,
    ) -> Batch:
        """Join sequences (in row order) into one batch."""
        parts = [np.asarray(t, dtype=np.int32) for t in token_ids]
        masks = [np.asarray(m, dtype=bool) for m in loss_masks]
        offsets = np.cumsum([0, *(len(t) for t in parts)], dtype=np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *parts])
        mask = np.concatenate([np.zeros(0, bool), *masks])
        return Batch(ids, mask, offsets, sequences_per_row, dict(columns or {}))

    def select(self, rows: np.ndarray | Sequence[int]) -> Batch:
        """The given rows, in the given order, with their columns."""
        rows = np.asarray(rows, dtype=np.int64)
        k = self.sequences_per_row
        sequences = (rows[:, None] * k + np.arange(k)).reshape(-1)
        lengths = self.lengths[sequences]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.arange(offsets[-1]) + np.repeat(self.offsets[sequences] - offsets[:-1], lengths)
        columns = {name: values[rows] for name, values in self.columns.items()}
        mask = self.loss_mask[tokens]
        of_tokens = {}
        if self.token_columns:
            counted = (np.cumsum(self.loss_mask) - 1)[tokens[mask]]
            of_tokens = {name: values[counted] for name, values in self.token_columns.items()}
        experts = None if self.experts is None else self.experts[tokens]
        return Batch(self.token_ids[tokens], mask, offsets, k, columns, of_tokens, experts)

    def with_columns(self, **columns: np.ndarray) -> Batch:
        """The same rows with more per-row values."""
        return replace(self, columns={**self.columns, **columns})

    def with_token_columns(self, **columns: np.ndarray) -> Batch:
        """The same rows with more values per counted token."""
        return replace(self, token_columns={**self.token_columns, **columns})

    def unrouted(self) -> Batch:
        """The same rows without given experts: the model's own routers choose them."""
        return self if self.experts is None else replace(self, experts=None)

    def groups(self) -> np.ndarray:
        """int64 (rows,): the first row with the same prompt, which is what stands before the first counted
        token of a row's first sequence."""
        first_of: dict[bytes, int] = {}
        found = np.empty(self.n_rows, dtype=np.int64)
        counted = np.append(np.flatnonzero(self.loss_mask), self.n_tokens)
        begins = self.offsets[:-1][:: self.sequences_per_row]
        ends = np.minimum(
            counted[np.searchsorted(counted, begins)], self.offsets[1:][:: self.sequences_per_row]
        )
        for row, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
            found[row] = first_of.setdefault(self.token_ids[begin:end].tobytes(), row)
        return found

    def shard_rows(self, rank: int, world_size: int, together: bool = False) -> np.ndarray:
        """int64: the rows of one data-parallel rank, ascending.

        Longest first, dealt back and forth (0 1 1 0 0 1 ...). Depends on tokens only, so every rank computes
        the same partition by itself.

        Args:
            rank: whose rows.
            world_size: number of ranks.
            together: rows with the same prompt are dealt together, where they are not too many.
        """
        dealt = self._units(world_size) if together else np.arange(self.n_rows)
        row_tokens = self.lengths.reshape(-1, self.sequences_per_row).sum(axis=1)
        unit_tokens = np.bincount(dealt, weights=row_tokens)
        order = np.argsort(-unit_tokens, kind="stable")
        position = np.arange(len(order)) % (2 * world_size)
        owner = np.empty(len(order), dtype=np.int64)
        owner[order] = np.minimum(position, 2 * world_size - 1 - position)
        return np.flatnonzero(owner[dealt] == rank)

    def _units(self, world_size: int) -> np.ndarray:
        """int64 (rows,): number of what a row is dealt with: rows of one prompt, to half a rank's share."""
        most = max(1, self.n_rows // (2 * world_size))
        groups = self.groups()
        order = np.argsort(groups, kind="stable")
        first = np.searchsorted(groups[order], groups[order])
        part = (np.arange(self.n_rows) - first) // most
        begins = np.append(True, (np.diff(groups[order]) != 0) | (np.diff(part) != 0))
        units = np.empty(self.n_rows, dtype=np.int64)
        units[order] = np.cumsum(begins[: self.n_rows]) - 1
        return units

    def shard(self, rank: int, world_size: int) -> Batch:
        """The rows of one data-parallel rank, see `shard_rows`."""
        return self if world_size == 1 else self.select(self.shard_rows(rank, world_size))

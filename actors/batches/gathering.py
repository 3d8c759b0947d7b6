"""Rows picked from rows, with the way back for their gradients found beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gathering:
    """Rows picked from N rows, and the way back for their gradients."""

    index: np.ndarray
    """int64 (M,): the row of each pick."""
    readers: tuple[np.ndarray, ...]
    """The picks that read a row: int64 (R, k) of R rows that are read k times each, for every such k. Picks
    whose gradient is zero, as padding's, are left out."""
    order: np.ndarray | None
    """int64 (N,): place of each row in `readers`, one array after the other; None: 0 to N - 1."""

    @staticmethod
    def of(index: np.ndarray, n: int, real: np.ndarray | None = None) -> Gathering:
        """Find the readers of each row. `n`: rows to pick from; `real`: bool (M,), False for picks without
        gradient."""
        picks = np.arange(len(index)) if real is None else np.flatnonzero(real)
        picks = picks[np.argsort(index[picks], kind="stable")]
        times = np.bincount(index[picks], minlength=n)
        first = np.cumsum(times) - times
        rows = [np.flatnonzero(times == k) for k in np.unique(times)]
        readers = tuple(picks[first[r][:, None] + np.arange(times[r[0]])] for r in rows)
        if len(rows) <= 1:
            return Gathering(index, readers, None)
        order = np.empty(n, dtype=np.int64)
        order[np.concatenate(rows)] = np.arange(n)
        return Gathering(index, readers, order)

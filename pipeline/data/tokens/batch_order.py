"""Order of a stage's rows: a pure function of seed and step, so that a resumed run goes on mid-way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np


class BatchOrder(Sequence[np.ndarray]):
    """Batch `k` of a stage, for any `k`, without going through those before it.

    Every epoch is a random permutation of all rows, by (seed, epoch), cut into batches; the last batch of
    an epoch holds what is left, with `whole` filled up from the beginning of the same permutation (so a row
    comes twice in a batch only where there are fewer rows than a batch has). Length: `max_steps` when
    positive (-1 is TRL's "not given"), else `ceil(epochs * batches an epoch)`.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        seed: int,
        *,
        epochs: float | None = None,
        max_steps: int | None = None,
        shuffle: bool = True,
        whole: bool = False,
    ) -> None:
        if n_rows < 1 or batch_size < 1:
            raise ValueError(f"n_rows ({n_rows}) and batch_size ({batch_size}) must be positive")
        limited = max_steps is not None and max_steps > 0
        if epochs is None and not limited:
            raise ValueError("give epochs or max_steps")
        self.n_rows, self.batch_size, self.seed, self.shuffle = n_rows, batch_size, seed, shuffle
        self.whole = whole
        self.steps_per_epoch = -(-n_rows // batch_size)
        self._steps = (max_steps or 0) if limited else math.ceil((epochs or 0) * self.steps_per_epoch)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> np.ndarray:  # type: ignore[override]
        """int64 (rows,): the rows of step `step`, counted from 0."""
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        epoch, k = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.n_rows, self.seed, epoch, self.shuffle)
        places = np.arange(k * self.batch_size, (k + 1) * self.batch_size)
        return order[places % self.n_rows if self.whole else places[places < self.n_rows]]

    @property
    def filled(self) -> int:
        """Rows of the last batch of an epoch that are there only to fill it; 0 where no batch comes to it."""
        reached = self.whole and self._steps >= self.steps_per_epoch
        return self.steps_per_epoch * self.batch_size - self.n_rows if reached else 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[step] for step in range(self._steps))

    def epoch(self, step: int) -> float:
        """Epochs done after `step` steps, as TRL logs it."""
        return step / self.steps_per_epoch


@lru_cache(maxsize=2)  # this epoch's and, around its end, the next one's
def epoch_order(n_rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """int64 (n_rows,): the permutation of one epoch."""
    if not shuffle:
        return np.arange(n_rows)
    order = np.random.default_rng([seed, epoch]).permutation(n_rows)
    order.setflags(write=False)  # shared by the cache
    return order

"""The sequences of a padding-free row, and two forms in which attention takes them.

Every sequence reads all of its tokens; those that it shares with another one stand in the row once. Either
groups of sequences, padded at their ends, attend in a call each, or all do in one call that is told where
each begins, with fewer queries than keys where tokens are shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from actors.batches.gathering import Gathering

SHORT = 96
"""Sequences up to this length share a call of attention: for them a call costs more than padding."""
PADDED_SHARE = 1.15
"""Most positions of such a call, as a multiple of its sequences' tokens."""


@dataclass(frozen=True)
class Groups:
    """Groups of sequences that attend in one call each."""

    shapes: tuple[tuple[int, int], ...]
    """Per group: sequences N, and the length L to which they are padded at their ends."""
    places: Gathering | None
    """(sum of N * L) positions of the row, group after group; None: 0 to T - 1."""
    outputs: Gathering | None
    """(T), for each position of the row: which of those outputs is its own; None: 0 to T - 1."""


@dataclass(frozen=True)
class Spans:
    """Sequences one after the other, without padding."""

    queries: np.ndarray
    """int32 (S + 1,): ends of each sequence's queries, its own tokens, from 0; the row itself."""
    keys: np.ndarray
    """int32 (S + 1,): ends of each sequence's keys, all of its tokens, from 0."""
    places: Gathering | None
    """(keys,) positions of the row; None: 0 to T - 1."""


@dataclass(frozen=True)
class AttentionPlan:
    """S sequences in a row of T positions: each sequence's own tokens, one sequence after the other."""

    places: np.ndarray
    """int64 (sum of lengths,): position in the row of each token of each sequence."""
    lengths: np.ndarray
    """int64 (S,): tokens of each sequence, shared ones included."""
    shared: np.ndarray
    """int64 (S,): first tokens of each that stand in the row as another sequence's; less than its length."""

    @cached_property
    def groups(self) -> Groups:
        """For calls of padded groups."""
        lengths, shared = self.lengths, self.shared
        offsets = np.cumsum(lengths) - lengths
        shapes, picked, real, own = [], [], [], []
        for group in _groups(lengths):
            longest = int(lengths[group].max())
            step = np.arange(longest)
            shapes.append((len(group), longest))
            # Padding is at the end and repeats the last token; causal attention hides it from all before.
            at = offsets[group][:, None] + np.minimum(step, lengths[group][:, None] - 1)
            picked.append(self.places[at].reshape(-1))
            real.append((step < lengths[group][:, None]).reshape(-1))
            own.append(real[-1] & (step >= shared[group][:, None]).reshape(-1))
        position = np.concatenate(picked)
        kept = np.flatnonzero(np.concatenate(own))
        outputs = np.empty_like(kept)
        outputs[position[kept]] = kept
        return Groups(
            tuple(shapes),
            _unless_all_in_order(position, len(kept), np.concatenate(real)),
            _unless_all_in_order(outputs, len(position)),
        )

    @cached_property
    def spans(self) -> Spans:
        """For one call of all sequences."""
        own = self.lengths - self.shared
        return Spans(_ends(own), _ends(self.lengths), _unless_all_in_order(self.places, int(own.sum())))


def _groups(lengths: np.ndarray) -> list[np.ndarray]:
    """Sequences that attend in one call: one each, but short ones of similar length together."""
    long = [np.array([s]) for s in np.flatnonzero(lengths > SHORT)]
    short = np.flatnonzero(lengths <= SHORT)
    short = short[np.argsort(-lengths[short], kind="stable")]
    members: list[list[int]] = []
    tokens = 0
    for sequence in short.tolist():
        length = int(lengths[sequence])
        positions = int(lengths[members[-1][0]]) * (len(members[-1]) + 1) if members else 0
        if members and positions <= PADDED_SHARE * (tokens + length):
            members[-1].append(sequence)
            tokens += length
        else:
            members.append([sequence])
            tokens = length
    return long + [np.array(group) for group in members]


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _unless_all_in_order(index: np.ndarray, n: int, real: np.ndarray | None = None) -> Gathering | None:
    """The rows to gather; None for 0 to n - 1, where nothing has to be gathered."""
    if len(index) == n and np.array_equal(index, np.arange(n)):
        return None
    return Gathering.of(index, n, real)

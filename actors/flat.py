"""Rows of a batch laid flat: every token of a micro-batch in one row without padding.

For models whose attention runs by sequence (actors/models/attention.py). The tokens that the sequences
of a row have in common before their first counted token, a pair's prompt, stand there once: everything
but attention is computed per token, so sharing them changes no value.
"""

from __future__ import annotations

import numpy as np

from actors.batch import Batch
from actors.packing import AttentionPlan, Gathering, MicroBatch, experts_at

SHORT = 96
"""Sequences up to this length attend several in one call: there calls cost more than padding."""
PADDED_SHARE = 1.15
"""Most positions that such a call may have, as a multiple of its sequences' tokens."""


def lay_flat(batch: Batch, rows: np.ndarray, share_prompts: bool) -> MicroBatch:
    """One micro-batch of some rows. `share_prompts`: common prompts of a row's sequences stand once."""
    part = batch.select(rows)
    shared = _shared(part) if share_prompts else np.zeros(part.n_sequences, dtype=np.int64)
    lengths = part.lengths
    own = lengths - shared
    starts = np.cumsum(own) - own
    # A shared position is that of the row's first sequence.
    first = np.arange(part.n_sequences) // part.sequences_per_row * part.sequences_per_row
    in_sequence = np.arange(part.n_tokens) - np.repeat(part.offsets[:-1], lengths)
    is_shared = in_sequence < np.repeat(shared, lengths)
    base = np.where(is_shared, np.repeat(starts[first], lengths), np.repeat(starts - shared, lengths))
    places = base + in_sequence
    counted = np.flatnonzero(part.loss_mask)
    return MicroBatch(
        input_ids=part.token_ids[~is_shared].astype(np.int64)[None],
        position_ids=in_sequence[~is_shared][None],
        real=np.ones((1, int(own.sum())), dtype=bool),
        predictors=places[counted - 1],
        labels=part.token_ids[counted].astype(np.int64),
        sequence=np.repeat(np.arange(part.n_sequences), lengths)[counted],
        last=places[part.offsets[1:] - 1],
        rows=rows,
        n_sequences=part.n_sequences,
        n_tokens=int(own.sum()),
        attention=_plan(places, part.offsets, shared),
        # A shared position is that of the first sequence, and was routed as such.
        experts=experts_at(
            places[~is_shared], None if part.experts is None else part.experts[~is_shared], int(own.sum())
        ),
    )


def _shared(part: Batch) -> np.ndarray:
    """int64 (S,): leading tokens that a sequence has in common with the first one of its row, and that
    stand before any counted token of both. Where experts are given, these are the same too."""
    found = np.zeros(part.n_sequences, dtype=np.int64)
    k = part.sequences_per_row
    for row in range(part.n_rows if k > 1 else 0):
        first = _tokens_before_answer(part, row * k)
        for sequence in range(row * k + 1, (row + 1) * k):
            other = _tokens_before_answer(part, sequence)
            n = min(len(first), len(other))
            differ = first[:n] != other[:n]
            if part.experts is not None:
                mine, theirs = (part.experts[part.offsets[s] :][:n] for s in (row * k, sequence))
                differ = differ | (mine != theirs).any(axis=(1, 2))
            places = np.flatnonzero(differ)
            found[sequence] = places[0] if len(places) else n
    return found


def _tokens_before_answer(part: Batch, sequence: int) -> np.ndarray:
    span = slice(part.offsets[sequence], part.offsets[sequence + 1])
    counted = part.loss_mask[span]
    ids = part.token_ids[span]
    return ids[: int(counted.argmax())] if counted.any() else ids[: len(ids) - 1]


def _plan(places: np.ndarray, offsets: np.ndarray, shared: np.ndarray) -> AttentionPlan:
    """`places`: position of the row for each token of each sequence; `shared`: as of `_shared`."""
    lengths = np.diff(offsets)
    shapes, picked, real, own = [], [], [], []
    for group in _groups(lengths):
        longest = int(lengths[group].max())
        step = np.arange(longest)
        shapes.append((len(group), longest))
        # Padding stands at the end and repeats the last token: nothing before it can see it.
        at = offsets[group][:, None] + np.minimum(step, lengths[group][:, None] - 1)
        picked.append(places[at].reshape(-1))
        real.append((step < lengths[group][:, None]).reshape(-1))
        own.append(real[-1] & (step >= shared[group][:, None]).reshape(-1))
    position = np.concatenate(picked)
    kept = np.flatnonzero(np.concatenate(own))
    outputs = np.empty_like(kept)
    outputs[position[kept]] = kept
    return AttentionPlan(
        tuple(shapes),
        _unless_all_in_order(position, len(kept), np.concatenate(real)),
        _unless_all_in_order(outputs, len(position)),
    )


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


def _unless_all_in_order(index: np.ndarray, n: int, real: np.ndarray | None = None) -> Gathering | None:
    """None for 0 to n - 1: then nothing has to be picked."""
    if len(index) == n and np.array_equal(index, np.arange(n)):
        return None
    return Gathering.of(index, n, real)

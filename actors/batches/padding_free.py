"""Lays out a batch without padding: every token of a micro-batch in one row.

For models whose attention runs by sequence (actors/models/attention/). Tokens that sequences have in common
before their first counted token (the prompt of a group of samples or of a pair, a system prompt) are in the
row once: everything but attention is computed per token, so sharing them changes no value.
"""

from __future__ import annotations

import itertools

import numpy as np

from actors.batches.attention_plan import AttentionPlan
from actors.batches.batch import Batch
from actors.batches.packing import MicroBatch, experts_at

WORTH_SHARING = 1 / 8
"""Least share of the tokens that sharing must save: it has all of attention's inputs gathered from the row,
which is otherwise done for short sequences only."""


def lay_out_padding_free(batch: Batch, rows: np.ndarray, share_prompts: bool) -> MicroBatch:
    """One micro-batch of some rows. `share_prompts`: tokens that sequences begin with in common are in it
    once."""
    part = batch.select(rows)
    lengths = part.lengths
    shared, before = _shared(part) if share_prompts else (np.zeros(part.n_sequences, dtype=np.int64), [])
    if shared.sum() < WORTH_SHARING * part.n_tokens:
        shared[:] = 0
    own = lengths - shared
    starts = np.cumsum(own) - own
    in_sequence = np.arange(part.n_tokens) - np.repeat(part.offsets[:-1], lengths)
    is_own = in_sequence >= np.repeat(shared, lengths)
    places = np.repeat(starts - shared, lengths) + in_sequence
    for sequence, other in before:
        n, at, there = shared[sequence], part.offsets[sequence], part.offsets[other]
        places[at : at + n] = places[there : there + n]
    counted = np.flatnonzero(part.loss_mask)
    size = int(own.sum())
    return MicroBatch(
        input_ids=part.token_ids[is_own].astype(np.int64)[None],
        position_ids=in_sequence[is_own][None],
        real=np.ones((1, size), dtype=bool),
        predictors=places[counted - 1],
        labels=part.token_ids[counted].astype(np.int64),
        sequence=np.repeat(np.arange(part.n_sequences), lengths)[counted],
        last=places[part.offsets[1:] - 1],
        rows=rows,
        n_sequences=part.n_sequences,
        n_tokens=size,
        attention=AttentionPlan(places, lengths, shared),
        # Sequences share a position only where their given experts are the same.
        experts=experts_at(places[is_own], None if part.experts is None else part.experts[is_own], size),
        copies=np.bincount(places, minlength=size) if shared.any() else None,
    )


def _shared(part: Batch) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(int64 (S,): leading tokens that a sequence has in common with another one and that stand before any
    counted token of both, where experts are given with the same ones; each such sequence with the other one,
    in an order in which that one's places are known).

    In the order of their prompts each sequence has most in common with the one before it.
    """
    shared = np.zeros(part.n_sequences, dtype=np.int64)
    prompts = [_before_answer(part, sequence) for sequence in range(part.n_sequences)]
    # Big-endian bytes have the order of the numbers.
    keys = [part.token_ids[prompt].astype(">u4").tobytes() for prompt in prompts]
    order = sorted(range(part.n_sequences), key=keys.__getitem__)
    pairs = []
    for other, sequence in itertools.pairwise(order):
        mine, theirs = prompts[sequence], prompts[other]
        n = min(mine.stop - mine.start, theirs.stop - theirs.start)
        mine, theirs = slice(mine.start, mine.start + n), slice(theirs.start, theirs.start + n)
        differ = part.token_ids[mine] != part.token_ids[theirs]
        if part.experts is not None:
            differ = differ | (part.experts[mine] != part.experts[theirs]).any(axis=(1, 2))
        at = int(differ.argmax()) if n else 0
        shared[sequence] = at if n and differ[at] else n
        if shared[sequence]:
            pairs.append((sequence, other))
    return shared, pairs


def _before_answer(part: Batch, sequence: int) -> slice:
    """Tokens of the batch that a sequence could share: those before its first counted one, never all."""
    begin, end = int(part.offsets[sequence]), int(part.offsets[sequence + 1])
    counted = part.loss_mask[begin:end]
    first = int(counted.argmax()) if counted.any() else end - begin - 1
    return slice(begin, begin + first)

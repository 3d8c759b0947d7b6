"""Pairs each prompt with another row's answer, from which KTO estimates its reference point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from actors.batches import Batch
from pipeline.data.tokens.tokenize import TokenizedData


def with_mismatched(
    data: TokenizedData, batches: Iterable[np.ndarray], max_length: int | None
) -> TokenizedData:
    """The rows, each with a second sequence: its prompt, answered as the row before it in its batch is.

    So in each of `batches` the mismatched answers are the batch's own, one place on (KTO, arXiv 2402.01306,
    section 4.2; TRL's KTOTrainer). The pairing is made once, along these batches: batches that later epochs
    shuffle otherwise estimate the same divergence from other rows' answers.

    Args:
        data: rows of one sequence.
        batches: rows of each batch; a row that is in none gets the answer of the row before it.
        max_length: the mismatched sequence is cut there at its end.
    """
    rows = data.sequences
    answered_by = (np.arange(rows.n_rows) - 1) % rows.n_rows
    before = answered_by[0]
    for batch in batches:
        # The last batch of an epoch may hold a single row, whose own answer would be no mismatch.
        answered_by[batch] = np.roll(batch, 1) if len(batch) > 1 else before
        before = batch[-1]
    starts = rows.offsets[:-1] + _prompt_lengths(rows)
    ids, masks = [], []
    for row, other in enumerate(answered_by):
        first, start, end = rows.offsets[row], starts[row], rows.offsets[row + 1]
        ids.append(rows.token_ids[first:end])
        masks.append(rows.loss_mask[first:end])
        answer = slice(starts[other], rows.offsets[other + 1])
        ids.append(np.concatenate([rows.token_ids[first:start], rows.token_ids[answer]])[:max_length])
        prompt = np.zeros(start - first, bool)
        masks.append(np.concatenate([prompt, rows.loss_mask[answer]])[:max_length])
    return replace(data, sequences=Batch.from_sequences(ids, masks, 2, rows.columns))


def _prompt_lengths(rows: Batch) -> np.ndarray:
    """int64 (rows,): tokens before the first counted one."""
    (counted,) = np.nonzero(rows.loss_mask)
    return counted[np.searchsorted(counted, rows.offsets[:-1])] - rows.offsets[:-1]

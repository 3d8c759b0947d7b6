"""Lays out rows of a batch for the model: micro-batches of bins, packed or with one sequence each.

Sequences that share a bin are kept apart by position ids that start again at 0; no attention mask is
passed, from which transformers derives a block-causal one. Padding is at the end of a bin, where
causal attention hides it from every real token, so it needs no mask either.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from actors.batches.attention_plan import AttentionPlan
from actors.batches.batch import Batch
from actors.batches.routed_experts import free

FREE = -1
"""Value in `MicroBatch.experts` where the model's own router chooses."""
BIN_LENGTHS = (1.0, 1.25, 1.5, 2.0)
"""Bin lengths tried, as multiples of the longest sequence. Longer bins waste less but attend further."""
ATTENTION_WIDTHS = 4
"""A token's attention to 4 x hidden positions costs as much as all the rest of its forward and backward
pass. Measured on a CPU at hidden 128 (0.14 us per position and 65 us per token); attention grows with
hidden, the rest with its square. A packed bin has a dense mask, so attention pays for the whole bin."""


@dataclass(frozen=True)
class MicroBatch:
    """Whole rows in one forward pass: B bins of length L, T counted tokens, S sequences, R rows."""

    input_ids: np.ndarray
    """int64 (B, L); padding is token 0."""
    position_ids: np.ndarray
    """int64 (B, L), from 0 in every sequence; padding continues the sequence before it."""
    real: np.ndarray
    """bool (B, L): False at padding."""
    predictors: np.ndarray
    """int64 (T,): flat index into (B, L) of the position that predicts each counted token."""
    labels: np.ndarray
    """int64 (T,): the counted tokens, by sequence and place."""
    sequence: np.ndarray
    """int64 (T,): sequence of each counted token, counted within this micro-batch."""
    last: np.ndarray
    """int64 (S,): flat index into (B, L) of each sequence's last token."""
    rows: np.ndarray
    """int64 (R,): rows of the batch, in this micro-batch's order."""
    n_sequences: int
    n_tokens: int
    """Real tokens, without padding; what sequences share counts once."""
    attention: AttentionPlan | None = None
    """For attention by sequence; None: the position ids separate the sequences."""
    experts: np.ndarray | None = None
    """int64 (B * L, layers, top_k): experts that are given for each position; `FREE` where none are."""
    copies: np.ndarray | None = None
    """int64 (B * L,): sequences that share each position; None: one each."""


LayOut = Callable[[Batch, np.ndarray], MicroBatch]
"""One micro-batch of some rows of a batch."""


def micro_batches(batch: Batch, max_tokens: int, lay_out: LayOut, together: bool = False) -> list[MicroBatch]:
    """Cut a batch into micro-batches of at most `max_tokens` positions (padding included), rows whole.

    A row beyond the budget is a micro-batch of its own. The result depends on the batch only.

    Args:
        batch: rows to compute.
        max_tokens: positions of a micro-batch, at most. How many micro-batches there are follows from all
            tokens: attention and labels of a prompt that sequences share take memory for each of them.
        lay_out: makes one.
        together: rows with the same prompt go into the same micro-batch, as far as they fit.
    """
    if batch.n_rows == 0:
        return []
    parts = max(1, -(-batch.n_tokens // max_tokens))
    while True:
        made = [lay_out(batch, rows) for rows in _split(batch, parts, together)]
        if all(m.input_ids.size <= max_tokens or len(m.rows) == 1 for m in made):
            return made
        parts = min(batch.n_rows, max(parts + 1, int(parts * 1.25)))


def in_bins(hidden_size: int) -> LayOut:
    """Layout with several sequences to a bin. The model's width says how long bins may be before attention
    outweighs less padding."""
    return partial(_lay_out, pack_for_width=hidden_size)


def padded(batch: Batch, rows: np.ndarray) -> MicroBatch:
    """Layout with one sequence to a bin."""
    return _lay_out(batch, rows, None)


def counted_places(batch: Batch, rows: np.ndarray) -> np.ndarray:
    """int64 (T,): places of some rows' counted tokens among all counted tokens of the batch."""
    counts = batch.label_counts
    first = np.cumsum(counts) - counts
    k = batch.sequences_per_row
    sequences = (rows[:, None] * k + np.arange(k)).reshape(-1)
    wanted = counts[sequences]
    before = np.cumsum(wanted) - wanted
    return np.arange(wanted.sum()) + np.repeat(first[sequences] - before, wanted)


def _split(batch: Batch, parts: int, together: bool) -> list[np.ndarray]:
    """Rows of similar length (`together`: and of one prompt) together, in `parts` groups of nearly as many
    tokens."""
    if parts == 1:
        return [np.arange(batch.n_rows)]
    row_tokens = batch.lengths.reshape(-1, batch.sequences_per_row).sum(axis=1)
    alike = batch.groups() if together else np.arange(batch.n_rows)
    longest = np.zeros(batch.n_rows, dtype=np.int64)
    np.maximum.at(longest, alike, row_tokens)
    order = np.lexsort((-row_tokens, alike, -longest[alike]))
    if parts >= batch.n_rows:
        return list(order[:, None])
    before = np.cumsum(row_tokens[order]) - row_tokens[order]
    # Rows of one prompt are cut where they would overfill a part.
    _, first, number = np.unique(alike[order], return_index=True, return_inverse=True)
    few = np.bincount(number, weights=row_tokens[order])[number] * parts * 2 <= batch.n_tokens
    group = np.where(few, before[first[number]], before) * parts // batch.n_tokens
    return [np.sort(order[group == g]) for g in range(parts) if (group == g).any()]


def _lay_out(batch: Batch, rows: np.ndarray, pack_for_width: int | None) -> MicroBatch:
    part = batch.select(rows)
    lengths = part.lengths
    bins, starts, n_bins, length = (
        _one_each(lengths) if pack_for_width is None else _pack(lengths, pack_for_width)
    )
    place = np.arange(part.n_tokens) - np.repeat(part.offsets[:-1], lengths)
    flat = np.repeat(bins * length + starts, lengths) + place
    input_ids = np.zeros(n_bins * length, dtype=np.int64)
    input_ids[flat] = part.token_ids
    real = np.zeros(n_bins * length, dtype=bool)
    real[flat] = True
    counted = np.flatnonzero(part.loss_mask)
    return MicroBatch(
        input_ids=input_ids.reshape(n_bins, length),
        position_ids=_positions(n_bins, length, bins, starts),
        real=real.reshape(n_bins, length),
        predictors=flat[counted] - 1,
        labels=part.token_ids[counted].astype(np.int64),
        sequence=np.repeat(np.arange(part.n_sequences), lengths)[counted],
        last=flat[part.offsets[1:] - 1],
        rows=rows,
        n_sequences=part.n_sequences,
        n_tokens=part.n_tokens,
        experts=experts_at(flat, part.experts, n_bins * length),
    )


def experts_at(places: np.ndarray, experts: np.ndarray | None, size: int) -> np.ndarray | None:
    """int64 (size, layers, top_k): a batch's given experts, `experts[i]` at position `places[i]`."""
    if experts is None:
        return None
    found = np.full((size, *experts.shape[1:]), FREE, dtype=np.int64)
    found[places] = np.where(experts == free(experts.dtype), FREE, experts.astype(np.int64))
    return found


def _positions(n_bins: int, length: int, bins: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(B, L): distance from the last sequence start at or before each position."""
    start_at = np.zeros((n_bins, length), dtype=np.int64)
    start_at[bins, starts] = starts
    return np.arange(length) - np.maximum.accumulate(start_at, axis=1)


def _one_each(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
    return np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64), len(lengths), int(lengths.max())


def _pack(lengths: np.ndarray, hidden_size: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(bin of each sequence, start in its bin, number of bins, bin length), cheapest of `BIN_LENGTHS`."""
    longest, total = int(lengths.max()), int(lengths.sum())
    best, best_cost = None, np.inf
    attention_share = 1 / (ATTENTION_WIDTHS * hidden_size)
    for factor in BIN_LENGTHS:
        capacity = min(int(longest * factor), total)
        per_token = 1 + capacity * attention_share
        if -(-total // capacity) * capacity * per_token >= best_cost:
            continue  # even without padding it can't be cheaper
        bins, starts, n_bins = _best_fit(lengths, capacity)
        length = int((starts + lengths).max())
        cost = n_bins * length * (1 + length * attention_share)
        if cost < best_cost:
            best, best_cost = (bins, starts, n_bins, length), cost
    assert best is not None
    return best


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best fit, longest first: each sequence into the fullest bin that still has room for it."""
    bins, starts = np.zeros(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
    free: list[tuple[int, int]] = []  # (room, bin), ascending
    n_bins = 0
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[sequence])
        at = bisect_left(free, (size, -1))
        room, target = free.pop(at) if at < len(free) else (capacity, n_bins)
        n_bins += target == n_bins
        bins[sequence], starts[sequence] = target, capacity - room
        insort(free, (room - size, target))
    return bins, starts, n_bins

"""Micro-batches: every row once, every counted token found, the budget kept."""

from __future__ import annotations

import numpy as np
import pytest

from actors.batch import Batch
from actors.packing import micro_batches


def batch_of(lengths: list[int], prompt: int = 2, sequences_per_row: int = 1) -> Batch:
    """Sequences of distinct token ids; the first `prompt` tokens of each don't count."""
    ids, masks, first = [], [], 1
    for length in lengths:
        ids.append(list(range(first, first + length)))
        masks.append([i >= prompt for i in range(length)])
        first += length
    return Batch.from_sequences(ids, masks, sequences_per_row)


LENGTHS = [9, 3, 14, 5, 5, 7, 4, 11, 3, 8]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_tokens", [16, 40, 10_000])
@pytest.mark.parametrize("sequences_per_row", [1, 2])
def test_every_counted_token_is_predicted_from_the_token_before_it(
    packing: bool, max_tokens: int, sequences_per_row: int
) -> None:
    batch = batch_of(LENGTHS, sequences_per_row=sequences_per_row)
    seen_rows, seen_labels = [], []
    for micro in micro_batches(batch, max_tokens, packing):
        predicting = micro.input_ids.reshape(-1)[micro.predictors]
        assert np.array_equal(predicting + 1, micro.labels)
        assert micro.real.sum() == micro.n_tokens
        assert np.all(np.diff(micro.sequence) >= 0)
        assert micro.n_sequences == len(micro.rows) * sequences_per_row
        seen_rows += micro.rows.tolist()
        seen_labels += micro.labels.tolist()
    assert sorted(seen_rows) == list(range(batch.n_rows))
    assert sorted(seen_labels) == batch.token_ids[batch.loss_mask].tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_position_ids_start_again_in_every_sequence(packing: bool) -> None:
    batch = batch_of(LENGTHS)
    (micro,) = micro_batches(batch, 10_000, packing)
    flat_ids, positions = micro.input_ids.reshape(-1), micro.position_ids.reshape(-1)
    for sequence in range(batch.n_sequences):
        ids = batch.token_ids[batch.offsets[sequence] : batch.offsets[sequence + 1]]
        start = int(np.flatnonzero(flat_ids == ids[0])[0])
        assert np.array_equal(flat_ids[start : start + len(ids)], ids)
        assert np.array_equal(positions[start : start + len(ids)], np.arange(len(ids)))


def test_micro_batches_keep_the_token_budget_unless_one_row_is_longer() -> None:
    for packing in (True, False):
        for micro in micro_batches(batch_of([30, *LENGTHS]), 20, packing):
            assert micro.input_ids.size <= 20 or len(micro.rows) == 1


def test_packing_fills_bins() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 400, size=64).tolist()
    (packed,) = micro_batches(batch_of(lengths), 10**6, packing=True)
    (padded,) = micro_batches(batch_of(lengths), 10**6, packing=False)
    assert packed.real.mean() > 0.85 > 0.7 > padded.real.mean()


def test_an_empty_batch_has_no_micro_batches() -> None:
    assert micro_batches(batch_of([]), 100, packing=True) == []


def test_shards_hold_every_row_once_and_balance_tokens() -> None:
    batch = batch_of(LENGTHS).with_columns(number=np.arange(10))
    shards = [batch.shard(rank, 2) for rank in range(2)]
    numbers = np.concatenate([s.columns["number"] for s in shards])
    assert sorted(numbers.tolist()) == list(range(10))
    assert abs(shards[0].n_tokens - shards[1].n_tokens) <= 4
    for shard in shards:
        for row, number in enumerate(shard.columns["number"]):
            ours = shard.token_ids[shard.offsets[row] : shard.offsets[row + 1]]
            assert np.array_equal(ours, batch.token_ids[batch.offsets[number] : batch.offsets[number + 1]])

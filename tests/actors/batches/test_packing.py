"""Micro-batches: every row once, every counted token found, the budget kept."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from actors.batches.attention_plan import SHORT
from actors.batches.batch import Batch
from actors.batches.packing import LayOut, MicroBatch, in_bins, micro_batches, padded
from actors.batches.padding_free import lay_out_padding_free


def batch_of(lengths: list[int], prompt: int = 2, sequences_per_row: int = 1) -> Batch:
    """Sequences of distinct token ids; the first `prompt` tokens of each don't count."""
    ids, masks, first = [], [], 1
    for length in lengths:
        ids.append(list(range(first, first + length)))
        masks.append([i >= prompt for i in range(length)])
        first += length
    return Batch.from_sequences(ids, masks, sequences_per_row)


LENGTHS = [9, 3, 14, 5, 5, 7, 4, 11, 3, 8]
BINS = in_bins(64)
PADDING_FREE = partial(lay_out_padding_free, share_prompts=True)
LAYOUTS = pytest.mark.parametrize(
    "lay_out", [BINS, padded, PADDING_FREE], ids=["bins", "padded", "padding_free"]
)


@LAYOUTS
@pytest.mark.parametrize("max_tokens", [16, 40, 10_000])
@pytest.mark.parametrize("sequences_per_row", [1, 2])
def test_every_counted_token_is_predicted_from_the_token_before_it(
    lay_out: LayOut, max_tokens: int, sequences_per_row: int
) -> None:
    batch = batch_of(LENGTHS, sequences_per_row=sequences_per_row)
    seen_rows, seen_labels = [], []
    for micro in micro_batches(batch, max_tokens, lay_out):
        predicting = micro.input_ids.reshape(-1)[micro.predictors]
        assert np.array_equal(predicting + 1, micro.labels)
        assert micro.real.sum() == micro.n_tokens
        assert np.all(np.diff(micro.sequence) >= 0)
        assert micro.n_sequences == len(micro.rows) * sequences_per_row
        seen_rows += micro.rows.tolist()
        seen_labels += micro.labels.tolist()
    assert sorted(seen_rows) == list(range(batch.n_rows))
    assert sorted(seen_labels) == batch.token_ids[batch.loss_mask].tolist()


@LAYOUTS
def test_position_ids_start_again_in_every_sequence(lay_out: LayOut) -> None:
    batch = batch_of(LENGTHS)
    (micro,) = micro_batches(batch, 10_000, lay_out)
    flat_ids, positions = micro.input_ids.reshape(-1), micro.position_ids.reshape(-1)
    for sequence in range(batch.n_sequences):
        ids = batch.token_ids[batch.offsets[sequence] : batch.offsets[sequence + 1]]
        start = int(np.flatnonzero(flat_ids == ids[0])[0])
        assert np.array_equal(flat_ids[start : start + len(ids)], ids)
        assert np.array_equal(positions[start : start + len(ids)], np.arange(len(ids)))


def test_micro_batches_keep_the_token_budget_unless_one_row_is_longer() -> None:
    for lay_out in (BINS, padded, PADDING_FREE):
        for micro in micro_batches(batch_of([30, *LENGTHS]), 20, lay_out):
            assert micro.input_ids.size <= 20 or len(micro.rows) == 1


def test_packing_fills_bins() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 400, size=64).tolist()
    (packed,) = micro_batches(batch_of(lengths), 10**6, BINS)
    (one_each,) = micro_batches(batch_of(lengths), 10**6, padded)
    assert packed.real.mean() > 0.85 > 0.7 > one_each.real.mean()


def pairs(prompt: int, answers: list[tuple[int, int]]) -> Batch:
    """Rows of two answers to one prompt; every token id tells row, answer and place."""
    ids, masks = [], []
    for row, lengths in enumerate(answers):
        head = [1000 * (row + 1) + i for i in range(prompt)]
        for answer, length in enumerate(lengths):
            ids.append(head + [1000 * (row + 1) + 100 * (answer + 1) + i for i in range(length)])
            masks.append([False] * prompt + [True] * length)
    return Batch.from_sequences(ids, masks, 2)


def sequences_of(micro: MicroBatch) -> list[np.ndarray]:
    """Positions of the row that each sequence attends over, padding at the end included."""
    assert micro.attention is not None
    plan = micro.attention.groups
    places = np.arange(micro.input_ids.size) if plan.places is None else plan.places.index
    sizes = [n * length for n, length in plan.shapes]
    groups = np.split(places, np.cumsum(sizes)[:-1])
    return [
        row
        for (n, length), group in zip(plan.shapes, groups, strict=True)
        for row in group.reshape(n, length)
    ]


@pytest.mark.parametrize("prompt", [7, SHORT + 5])
def test_a_padding_free_row_has_a_shared_prompt_once_and_every_sequence_whole(prompt: int) -> None:
    batch = pairs(prompt, [(3, 5), (4, 4), (1, 6)])
    (micro,) = micro_batches(batch, 10**6, PADDING_FREE)
    assert micro.n_tokens == micro.input_ids.size == 3 * prompt + 23
    ids, positions = micro.input_ids[0], micro.position_ids[0]
    assert micro.attention is not None
    wanted = [batch.token_ids[a:b] for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    found = sequences_of(micro)
    assert len(found) == 6
    for places in found:
        read = ids[places]
        (match,) = [
            w for w in wanted if np.array_equal(w, read[: len(w)]) and (read[len(w) :] == w[-1]).all()
        ]
        assert np.array_equal(positions[places[: len(match)]], np.arange(len(match)))


@pytest.mark.parametrize("prompt", [7, SHORT + 5])
def test_each_position_of_a_padding_free_row_takes_its_attention_from_one_sequence(prompt: int) -> None:
    (micro,) = micro_batches(pairs(prompt, [(3, 5), (4, 4), (1, 6)]), 10**6, PADDING_FREE)
    assert micro.attention is not None
    places = np.concatenate(sequences_of(micro))
    outputs = micro.attention.groups.outputs
    assert np.array_equal(
        places if outputs is None else places[outputs.index], np.arange(micro.input_ids.size)
    )


def test_padding_behind_the_last_position_is_left_out() -> None:
    (micro,) = micro_batches(batch_of([20, 19]), 100, PADDING_FREE)
    assert micro.attention is not None
    assert micro.attention.groups.outputs is not None
    assert micro.attention.groups.shapes == ((2, 20),)
    assert len(micro.attention.groups.outputs.index) == 39


def test_prompts_are_shared_only_up_to_the_first_counted_token() -> None:
    same = Batch.from_sequences(
        [[5, 6, 7, 8]] * 2, [[False, True, True, True], [False, False, True, True]], 2
    )
    (micro,) = micro_batches(same, 100, PADDING_FREE)
    assert micro.n_tokens == 7
    (apart,) = micro_batches(same, 100, partial(lay_out_padding_free, share_prompts=False))
    assert apart.n_tokens == 8


def samples(prompts: list[list[int]], each: int) -> Batch:
    """`each` samples of every prompt, one token each, all different."""
    ids = [[*prompt, 100 * row + sample] for row, prompt in enumerate(prompts, 1) for sample in range(each)]
    masks = [[i == len(sequence) - 1 for i in range(len(sequence))] for sequence in ids]
    return Batch.from_sequences(ids, masks)


def test_what_prompts_begin_with_in_common_stands_once() -> None:
    batch = samples([[1, 2, 7, 8], [1, 2, 5], [1, 2, 7, 9]], 2)
    (micro,) = micro_batches(batch, 100, PADDING_FREE)
    # Whose prompt comes first in the order of tokens has what others share.
    assert micro.input_ids.tolist() == [[7, 8, 100, 101, 1, 2, 5, 200, 201, 9, 300, 301]]
    assert micro.position_ids.tolist() == [[2, 3, 4, 4, 0, 1, 2, 3, 3, 3, 4, 4]]
    assert micro.copies is not None
    assert micro.copies.tolist() == [4, 2, 1, 1, 6, 6, 2, 1, 1, 2, 1, 1]
    read = [micro.input_ids[0][places].tolist() for places in sequences_of(micro)]
    # Those of one call are as long as the longest of them: the last token stands there again.
    assert sorted(read) == [
        *([1, 2, 5, 200, 200], [1, 2, 5, 201, 201], [1, 2, 7, 8, 100], [1, 2, 7, 8, 101]),
        *([1, 2, 7, 9, 300], [1, 2, 7, 9, 301]),
    ]
    assert micro.input_ids[0][micro.predictors].tolist() == [8, 8, 5, 5, 9, 9]
    assert micro.labels.tolist() == [100, 101, 200, 201, 300, 301]


def test_little_in_common_is_not_shared() -> None:
    (micro,) = micro_batches(samples([[1, *range(10, 20)], [1, *range(30, 40)]], 1), 100, PADDING_FREE)
    assert micro.n_tokens == 24
    assert micro.copies is None


def test_rows_of_one_prompt_stay_in_one_micro_batch() -> None:
    in_turn = [0, 2, 4, 6, 1, 3, 5, 7]
    batch = samples([[1, 2, 3, 4], [5, 6, 7, 8, 9], [3, 2, 1], [4, 5]], 2).select(in_turn)
    found = [micro.rows.tolist() for micro in micro_batches(batch, 19, PADDING_FREE, together=True)]
    assert found == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_an_empty_batch_has_no_micro_batches() -> None:
    assert micro_batches(batch_of([]), 100, BINS) == []


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

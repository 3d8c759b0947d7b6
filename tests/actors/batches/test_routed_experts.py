"""Experts stay with their tokens from the engine's samples to the places of a micro-batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from actors.batches.batch import Batch
from actors.batches.generations import Generations
from actors.batches.packing import FREE, LayOut, in_bins, micro_batches, padded
from actors.batches.padding_free import lay_out_padding_free
from actors.batches.routed_experts import RoutedExperts, expert_dtype, free
from actors.batches.trajectories import trajectory_batch

LAYERS, TOP_K = 3, 2


def experts_of(positions: list[int]) -> np.ndarray:
    """(positions, layers, top_k): numbers that say which position and layer they are of."""
    place = np.asarray(positions, np.uint8)[:, None, None]
    return (place + 50 * np.arange(LAYERS)[:, None] + np.array([0, 100])).astype(np.uint8)


def test_256_experts_need_two_bytes_because_one_number_means_none() -> None:
    assert [expert_dtype(n) for n in (8, 255, 256, 60_000)] == [np.uint8, np.uint8, np.uint16, np.uint16]
    assert free(np.dtype(np.uint8)) == 255


def test_the_last_token_of_each_sample_has_no_experts() -> None:
    samples = Generations.of([([7, 2], [-0.5, -0.25], "stop"), ([8], [-1.0], "length")], 1, "v0", 0.1)
    samples = samples.with_experts(RoutedExperts.of([experts_of([0, 1, 2, 3]), experts_of([5])]))
    batch = trajectory_batch([[1, 3, 4], [5]], samples)
    assert batch.experts is not None
    assert batch.experts[:, 0, 0].tolist() == [0, 1, 2, 3, 255, 5, 255]
    assert (batch.experts[4] == 255).all()
    assert batch.unrouted().experts is None


def test_experts_that_do_not_fit_the_samples_are_refused() -> None:
    choices = RoutedExperts.of([experts_of([0, 1])])
    with pytest.raises(ValueError, match=r"experts of 2 positions for samples that have 4"):
        choices.of_sequences([5])


def test_parts_are_joined_in_order_and_only_if_all_have_experts() -> None:
    parts = [
        Generations.of([([7], [-0.5], "stop")] * 2, 1, "v", 0.1).with_experts(
            RoutedExperts.of([experts_of([first, first + 1]), experts_of([first + 2])])
        )
        for first in (0, 3)
    ]
    joined = Generations.join(parts, 1)
    assert joined.experts is not None
    assert joined.experts[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert joined.expert_offsets is not None
    assert joined.expert_offsets.tolist() == [0, 2, 3, 5, 6]
    assert np.array_equal(joined.experts, Generations.from_arrays(joined.arrays(), 1, "v", 0.1).experts)
    with pytest.raises(ValueError, match="others without"):
        Generations.join([parts[0], replace(parts[1], experts=None, expert_offsets=None)], 1)


def routed(lengths: list[int], sequences_per_row: int = 1) -> Batch:
    """Token ids that say their place in the batch, with experts that say the same."""
    ends = np.cumsum(lengths)
    ids = [list(range(end - length, end)) for length, end in zip(lengths, ends)]
    masks = [[i > 1 for i in range(length)] for length in lengths]
    batch = Batch.from_sequences(ids, masks, sequences_per_row)
    experts = experts_of(list(range(batch.n_tokens)))
    experts[ends - 1] = 255
    return replace(batch, experts=experts)


@pytest.mark.parametrize(
    "lay_out",
    [in_bins(64), padded, partial(lay_out_padding_free, share_prompts=True)],
    ids=["bins", "padded", "padding_free"],
)
@pytest.mark.parametrize("max_tokens", [8, 100])
def test_every_position_of_a_micro_batch_has_its_tokens_experts(lay_out: LayOut, max_tokens: int) -> None:
    batch = routed([5, 3, 9, 4, 6]).select([3, 0, 4, 2])
    seen = []
    for micro in micro_batches(batch, max_tokens, lay_out):
        assert micro.experts is not None
        of_first_layer = micro.experts[:, 0, 0]
        ids = micro.input_ids.reshape(-1)
        given = of_first_layer != FREE
        assert np.array_equal(of_first_layer[given], ids[given])
        assert not given[~micro.real.reshape(-1)].any()
        # The free ones among real tokens are the sequences' last.
        assert np.array_equal(np.flatnonzero(~given & micro.real.reshape(-1)), np.sort(micro.last))
        assert np.array_equal(micro.experts[given][:, 2, 1], ids[given] + 200)
        seen += ids[micro.real.reshape(-1)].tolist()
    assert sorted(seen) == sorted(batch.token_ids.tolist())


def test_a_prompt_is_shared_only_as_far_as_it_was_routed_alike() -> None:
    batch = Batch.from_sequences([[1, 2, 3, 9], [1, 2, 3, 8]], [[0, 0, 0, 1]] * 2, 2)
    experts = experts_of([1, 2, 3, 9, 1, 2, 3, 8])
    alike = lay_out_padding_free(replace(batch, experts=experts), np.array([0]), share_prompts=True)
    assert alike.input_ids.tolist() == [[1, 2, 3, 9, 8]]
    experts[6, 1, 0] += 1
    apart = lay_out_padding_free(replace(batch, experts=experts), np.array([0]), share_prompts=True)
    assert apart.input_ids.tolist() == [[1, 2, 3, 9, 3, 8]]
    assert apart.experts is not None
    assert apart.experts[:, 0, 0].tolist() == [1, 2, 3, 9, 3, 8]

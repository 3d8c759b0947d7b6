"""The parts of a micro-batch that ranks share out are, together, the micro-batch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from actors.batches.batch import Batch
from actors.batches.packing import MicroBatch, padded
from actors.batches.padding_free import lay_out_padding_free
from actors.batches.position_shares import PositionShare, position_share


def shared_out(micro: MicroBatch, ranks: int) -> list[PositionShare]:
    parts = [position_share(micro, rank, ranks) for rank in range(ranks)]
    assert all(isinstance(part, PositionShare) for part in parts)
    return parts  # type: ignore[return-value]


@pytest.fixture
def micro() -> MicroBatch:
    """Two answers to a prompt of 5 and one to a prompt of 2: 15 positions."""
    ids = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 8, 9, 10], [11, 12, 13, 14, 15]]
    masks = [np.arange(len(one)) >= (5 if one[0] == 1 else 2) for one in ids]
    experts = np.arange(20 * 2, dtype=np.uint8).reshape(20, 1, 2)
    experts[7:12] = experts[:5]
    batch = Batch.from_sequences(ids, masks)
    batch = Batch(batch.token_ids, batch.loss_mask, batch.offsets, experts=experts)
    found = partial(lay_out_padding_free, share_prompts=True)(batch, np.arange(3))
    assert found.input_ids.size == 15
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_position_label_and_end_is_on_one_rank(micro: MicroBatch, ranks: int) -> None:
    parts = shared_out(micro, ranks)
    sizes = {part.input_ids.size for part in parts}
    assert len(sizes) == 1
    each = sizes.pop()
    for name in ("input_ids", "position_ids", "experts", "copies"):
        whole = getattr(micro, name)
        joined = np.concatenate([getattr(part, name).reshape(each, -1) for part in parts])
        assert np.array_equal(joined[:15], whole.reshape(15, -1)), name
    assert np.concatenate([part.real for part in parts], axis=1).sum() == 15
    assert [*np.concatenate([part.positions for part in parts])] == [*range(15)]
    for places, found in (("predictors", "counted"), ("last", "ends")):
        whole = getattr(micro, places)
        back = np.full_like(whole, -1)
        for rank, part in enumerate(parts):
            back[getattr(part, found)] = getattr(part, places) + rank * each
        assert np.array_equal(back, whole), places
    labels = np.zeros_like(micro.labels)
    for part in parts:
        labels[part.counted] = part.labels
    assert np.array_equal(labels, micro.labels)


def test_padding_is_a_sequence_of_its_own_that_nothing_counts(micro: MicroBatch) -> None:
    *_, last = shared_out(micro, 4)
    assert last.real.tolist() == [[True, True, True, False]]
    assert last.position_ids[0, -1] == 0
    assert last.copies is not None
    assert last.copies[-1] == 0
    assert last.attention is not None
    assert micro.attention is not None
    assert [*last.attention.lengths] == [*micro.attention.lengths, 1]
    assert last.attention.places[-1] == 15
    (even, _, _) = shared_out(micro, 3)
    assert even.attention is micro.attention


def test_one_rank_has_the_micro_batch_itself(micro: MicroBatch) -> None:
    assert position_share(micro, 0, 1) is micro


def test_padded_rows_are_not_shared_out() -> None:
    batch = Batch.from_sequences([[1, 2, 3]], [[False, True, True]])
    with pytest.raises(AssertionError, match="padding-free"):
        position_share(padded(batch, np.arange(1)), 0, 2)

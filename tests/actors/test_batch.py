"""Batches: rows picked with everything that belongs to them."""

import numpy as np

from actors.batch import Batch


def test_select_takes_token_columns_along() -> None:
    batch = Batch.from_sequences(
        [[1, 2, 3], [4, 5], [6, 7, 8, 9]], [[0, 1, 1], [0, 1], [0, 0, 1, 1]]
    ).with_token_columns(advantage=np.array([0.2, 0.3, 0.5, 0.8, 0.9]))
    picked = batch.select([2, 0])
    assert picked.token_ids[picked.loss_mask].tolist() == [8, 9, 2, 3]
    assert picked.token_columns["advantage"].tolist() == [0.8, 0.9, 0.2, 0.3]


def test_columns_are_added_without_losing_others() -> None:
    batch = Batch.from_sequences([[1, 2]], [[0, 1]], columns={"a": np.array([1.0])})
    both = batch.with_token_columns(t=np.array([2.0])).with_columns(b=np.array([3.0]))
    assert set(both.columns) == {"a", "b"}
    assert both.token_columns["t"].tolist() == [2.0]

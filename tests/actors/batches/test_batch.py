"""Batches: rows picked with everything that belongs to them."""

import numpy as np

from actors.batches.batch import Batch


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


def of_prompts(prompts: list[int]) -> Batch:
    """A row of three tokens for each: prompt, an answer of two."""
    return Batch.from_sequences([[p, 7, 7] for p in prompts], [[False, True, True]] * len(prompts))


def test_ranks_get_rows_of_one_prompt_together() -> None:
    batch = of_prompts([5, 6, 5, 6, 8, 9, 8, 9])
    assert batch.groups().tolist() == [0, 1, 0, 1, 4, 5, 4, 5]
    shares = [batch.shard_rows(rank, 2, together=True).tolist() for rank in range(2)]
    assert shares == [[0, 2, 5, 7], [1, 3, 4, 6]]


def test_many_rows_of_one_prompt_are_dealt_in_parts() -> None:
    shares = [of_prompts([5] * 8).shard_rows(rank, 2, together=True).tolist() for rank in range(2)]
    assert shares == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_rows_without_a_common_prompt_are_dealt_as_always() -> None:
    batch = of_prompts([1, 2, 3, 4, 5])
    for rank in range(2):
        alone = batch.shard_rows(rank, 2)
        assert batch.shard_rows(rank, 2, together=True).tolist() == alone.tolist()
    assert batch.shard_rows(0, 2).tolist() == [0, 3, 4]


def test_a_rows_prompt_ends_where_its_first_sequence_counts() -> None:
    pairs = Batch.from_sequences([[1, 2], [3, 4], [1, 5], [9, 9], [1, 6], [2, 2]], [[0, 1]] * 6, 2)
    assert pairs.groups().tolist() == [0, 0, 0]
    nothing_counts = Batch.from_sequences([[1, 2], [1, 2], [1, 3]], [[0, 0]] * 3)
    assert nothing_counts.groups().tolist() == [0, 0, 2]

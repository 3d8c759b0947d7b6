"""Order and mixtures are pure functions of their arguments."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.data.reading.records import Records, load_records
from pipeline.data.spec import DataSources, slice_bounds
from pipeline.data.tokens.batch_order import BatchOrder


def test_an_epoch_visits_every_row_once_in_another_order_than_the_next() -> None:
    order = BatchOrder(10, 4, seed=1, epochs=2)
    assert [len(batch) for batch in order] == [4, 4, 2] * 2
    first, second = (np.concatenate([order[k] for k in steps]) for steps in (range(3), range(3, 6)))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_whole_order_fills_the_last_batch_from_the_beginning_of_its_epoch(shuffle: bool) -> None:
    plain = BatchOrder(10, 4, seed=1, epochs=2, shuffle=shuffle)
    whole = BatchOrder(10, 4, seed=1, epochs=2, shuffle=shuffle, whole=True)
    assert [len(set(batch.tolist())) for batch in whole] == [4] * 6
    for step, rows in enumerate(plain):
        filled = plain[step - 2][:2].tolist() if step % 3 == 2 else []
        assert whole[step].tolist() == rows.tolist() + filled
    assert (len(whole), whole.epoch(3), whole.filled) == (6, 1.0, 2)


def test_fewer_rows_than_a_batch_are_repeated_in_it() -> None:
    (batch,) = BatchOrder(3, 7, seed=1, epochs=1, whole=True)
    assert batch.tolist() == [*batch[:3], *batch[:3], batch[0]]
    assert sorted(batch[:3]) == [0, 1, 2]


def test_nothing_is_filled_where_rows_come_out_even_or_no_step_comes_to_the_last_batch() -> None:
    assert BatchOrder(8, 4, seed=1, epochs=3, whole=True).filled == 0
    assert BatchOrder(10, 4, seed=1, max_steps=2, whole=True).filled == 0
    assert BatchOrder(10, 4, seed=1, max_steps=3, whole=True).filled == 2
    assert BatchOrder(10, 4, seed=1, epochs=3).filled == 0


def test_a_resumed_run_sees_the_same_batches() -> None:
    whole = [batch.tolist() for batch in BatchOrder(100, 7, seed=3, max_steps=40)]
    later = BatchOrder(100, 7, seed=3, max_steps=40)
    assert [later[step].tolist() for step in range(25, 40)] == whole[25:]


def test_another_seed_gives_another_order_and_no_shuffle_gives_the_rows_as_they_are() -> None:
    assert (
        BatchOrder(50, 50, seed=1, epochs=1)[0].tolist() != BatchOrder(50, 50, seed=2, epochs=1)[0].tolist()
    )
    assert BatchOrder(5, 2, seed=1, max_steps=3, shuffle=False)[2].tolist() == [4]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(1, -1, 4), (0.5, -1, 2), (2.6, -1, 11), (3, 5, 5), (None, 9, 9)]
)
def test_steps_follow_trls_rule(epochs: float | None, max_steps: int, steps: int) -> None:
    assert len(BatchOrder(10, 3, seed=0, epochs=epochs, max_steps=max_steps)) == steps


def mixture(
    tmp_path: Path, sizes: list[int], weights: list[float | None], seed: int = 0, **options: int
) -> Records:
    specs = []
    for index, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        path = tmp_path / f"{index}.jsonl"
        path.write_text("".join(json.dumps({"text": f"source {index} row {i}"}) + "\n" for i in range(size)))
        specs.append({"source": str(path), "weight": weight})
    return load_records(TypeAdapter(DataSources).validate_python(specs), "sft", seed=seed, **options)


def test_sources_without_weights_are_joined(tmp_path: Path) -> None:
    assert [r.source for r in mixture(tmp_path, [3, 2], [None, None]).rows] == [0, 0, 0, 1, 1]


def test_weights_are_shares_and_no_row_is_repeated(tmp_path: Path) -> None:
    records = mixture(tmp_path, [300, 100], [1, 1])
    assert [use.rows_used for use in records.sources] == [100, 100]
    assert len({(r.source, r.row) for r in records.rows}) == 200
    assert [use.rows_used for use in mixture(tmp_path, [300, 100], [0.9, 0.1]).sources] == [300, 33]


def test_a_weighted_mixture_is_spread_evenly_and_chosen_by_the_seed(tmp_path: Path) -> None:
    records = mixture(tmp_path, [90, 30], [2, 1])
    assert sum(r.source for r in records.rows[:30]) == 10
    again, other = mixture(tmp_path, [90, 30], [2, 1]), mixture(tmp_path, [90, 30], [2, 1], seed=1)
    assert records.fingerprint == again.fingerprint != other.fingerprint


def test_a_cap_takes_rows_of_every_source(tmp_path: Path) -> None:
    records = mixture(tmp_path, [30, 30, 30], [None] * 3, max_rows=8)
    assert len(records) == 8
    assert {r.source for r in records.rows} == {0, 1, 2}


@pytest.mark.parametrize(
    ("split", "rows"),
    [("train", (0, 7)), ("train[:3]", (0, 3)), ("t[50%:]", (4, 7)), ("t[-2:]", (5, 7)), ("t[5:3]", (5, 5))],
)
def test_slices_follow_datasets(split: str, rows: tuple[int, int]) -> None:
    assert slice_bounds(split, 7) == rows


def test_a_sum_of_splits_is_refused_with_the_form_expected() -> None:
    with pytest.raises(ValidationError, match="not of the form train"):
        TypeAdapter(DataSources).validate_python([{"source": "a/b", "split": "train+test"}])

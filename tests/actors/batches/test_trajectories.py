"""Samples joined into a batch keep every token, its log-probability and how it ended."""

import numpy as np

from actors.batches.generations import Generations
from actors.batches.trajectories import sample_offsets, sample_sums, trajectory_batch


def test_completions_are_the_counted_tokens() -> None:
    samples = Generations.of([([7, 2], [-0.5, -0.25], "stop"), ([8], [-1.0], "length")], 1, "v0", 0.1)
    batch = trajectory_batch([[1, 3, 4], [5]], samples)
    assert batch.token_ids.tolist() == [1, 3, 4, 7, 2, 5, 8]
    assert batch.token_ids[batch.loss_mask].tolist() == [7, 2, 8]
    assert batch.columns["finished"].tolist() == [True, False]
    assert batch.token_columns["engine_logps"].tolist() == [-0.5, -0.25, -1.0]
    assert sample_offsets(batch).tolist() == [0, 2, 3]
    assert sample_sums(batch, np.array([1.0, 2.0, 4.0])).tolist() == [3.0, 4.0]

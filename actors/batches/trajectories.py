"""Samples as a batch: prompt and completion of each, with the engine's log-probability of every token.

A sample is a row of one sequence; the tokens that the engine drew are the counted ones. All that later steps
compute (log-probabilities, values, advantages) is added as a column per sample or per counted token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actors.batches.batch import Batch
from actors.batches.generations import FINISH_REASONS, Generations

STOPPED = FINISH_REASONS.index("stop")


def trajectory_batch(prompts: Sequence[Sequence[int]], samples: Generations) -> Batch:
    """Prompt + completion of every sample, in the engine's own tokens (never re-tokenised).

    Args:
        prompts: token ids of each sample's prompt: as many as there are samples, N.

    Returns:
        N rows; columns `finished` (bool: it ended by a stop token, not at the limit) and, per counted token,
        `engine_logps` (float64). With the engine's experts, where the samples have them: their last position
        is free. With an environment also `turn_rewards` (float64 per counted token, 0 where it gave none).
    """
    completions = list(samples.sequences())
    ids = [np.concatenate([np.asarray(p, np.int32), c]) for p, c in zip(prompts, completions, strict=True)]
    drawn = np.split(samples.drawn_mask, samples.offsets[1:-1])
    masks = [np.concatenate([np.zeros(len(p), bool), d]) for p, d in zip(prompts, drawn, strict=True)]
    batch = Batch.from_sequences(ids, masks, columns={"finished": samples.finish == STOPPED})
    choices = samples.routed_experts
    if choices is not None:
        batch = replace(batch, experts=choices.of_sequences(batch.lengths))
    counted = samples.drawn_mask
    batch = batch.with_token_columns(engine_logps=samples.logprobs[counted].astype(np.float64))
    if samples.turn_rewards is None:
        return batch
    return batch.with_token_columns(turn_rewards=np.nan_to_num(samples.turn_rewards[counted], nan=0.0))


def sample_offsets(batch: Batch) -> np.ndarray:
    """int64 (N + 1,): counted tokens of sample `i` are `offsets[i]:offsets[i + 1]` of a token column."""
    return np.concatenate([[0], np.cumsum(batch.label_counts)])


def sample_sums(batch: Batch, values: np.ndarray) -> np.ndarray:
    """(counted tokens,) -> (N,): sums over each sample's tokens."""
    sample = np.repeat(np.arange(batch.n_rows), batch.label_counts)
    return np.bincount(sample, weights=values, minlength=batch.n_rows)

"""Online DPO: from samples and their rewards to the pairs that the loss reads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from actors.algorithms import ld_weights
from actors.batches import Batch, sample_sums
from pipeline.stages.online.estimates import Estimates, TokenScores

if TYPE_CHECKING:
    from pipeline.stages.specs.registry import OnlineDpoStage

REF = "ref_logps"


def best_and_worst(rewards: np.ndarray, num_generations: int) -> np.ndarray:
    """int64 (pairs, 2): numbers of the samples with the highest and the lowest reward of their prompt.

    Of equal ones the first is taken. A prompt whose scored samples all have the same reward gives none.

    Args:
        rewards: float64 (N,), NaN where nobody scored; N in groups of `num_generations`.
    """
    groups = rewards.reshape(-1, num_generations)
    best = np.where(np.isnan(groups), -np.inf, groups)
    worst = np.where(np.isnan(groups), np.inf, groups)
    differ = best.max(axis=1) > worst.min(axis=1)
    found = np.stack([best.argmax(axis=1), worst.argmin(axis=1)], axis=1)
    return (found + np.arange(len(groups))[:, None] * num_generations)[differ]


def pairs_of(spec: OnlineDpoStage, batch: Batch, rewards: np.ndarray, scores: TokenScores) -> Estimates:
    """The samples' pairs, chosen first, with the reference's log-probabilities as offline DPO has them.

    Args:
        rewards: float64 (samples,), penalties included; NaN for samples that no reward applies to.
        scores: of the policy that they come from and of the reference, by token.
    """
    assert scores.ref_logps is not None
    assert scores.old_logps is not None
    pairs = best_and_worst(rewards, spec.num_generations)
    margins = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    kl = scores.old_logps - scores.ref_logps
    of_samples = float(sample_sums(batch, kl).mean())
    metrics = {
        "frac_pairs": len(pairs) * spec.num_generations / max(1, len(rewards)),
        "objective/scores_margin": float(margins.mean()) if len(pairs) else 0.0,
        "objective/kl": of_samples,
        "kl": float(kl.mean()) if len(kl) else 0.0,
    }
    samples = batch.with_token_columns(**{REF: scores.ref_logps}).select(pairs.reshape(-1))
    made = replace(samples, sequences_per_row=2, columns={}, token_columns={})
    tokens = samples.token_columns[REF]
    if spec.ld_alpha is not None:
        tokens = tokens * ld_weights(made, spec.ld_alpha)
    ref = sample_sums(samples, tokens).reshape(-1, 2)
    made = made.with_columns(ref_chosen_logps=ref[:, 0], ref_rejected_logps=ref[:, 1])
    return Estimates(made, of_samples, margins, finite={"margins": margins}, metrics=metrics)

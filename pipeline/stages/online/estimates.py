"""From rewards to what the losses read: divergence, advantages and returns, as columns of the samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from actors.algorithms import (
    CORRECTION,
    TOP_IDS,
    TOP_LOGPS,
    AdvantageSpec,
    Scored,
    advantages_of,
    explained_variance,
    importance_ratios,
    kl_values,
)
from actors.batches import Batch, sample_offsets, sample_sums

if TYPE_CHECKING:
    from pipeline.stages.specs.registry import PolicyGradientStage


@dataclass(frozen=True)
class TokenScores:
    """Scores of the samples' tokens, by models; each float64 (counted tokens,), None where nobody asked."""

    old_logps: np.ndarray | None = None
    """The policy's log-probabilities before this step's updates, by the trainer, at the temperature; None:
    the update finds them itself (`PolicyLoss.on_policy`)."""
    ref_logps: np.ndarray | None = None
    values: np.ndarray | None = None
    teacher_top: np.ndarray | None = None
    """float64 (counted tokens, 2 k): ids of the teacher's most probable tokens, then their
    log-probabilities."""
    unreplayed_logps: np.ndarray | None = None
    """As `old_logps`, with the trainer's own routes where those replay the engine's."""


@dataclass(frozen=True)
class Estimates:
    """Estimates from the samples, as the losses read them."""

    batch: Batch
    """Its rows with every column: the samples, or pairs of them."""
    kl: float | None
    """Mean over samples of the divergence from the reference, summed over tokens, in nats."""
    signal: np.ndarray
    """Signal to learn from: all zero, or empty, where the samples teach nothing."""
    kept: np.ndarray | None = None
    """bool (samples,): those that were not left out for being cut; None: none was."""
    finite: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays that must be finite, by name."""
    metrics: dict[str, float] = field(default_factory=dict)


def estimate(
    spec: PolicyGradientStage, batch: Batch, rewards: np.ndarray, scores: TokenScores, beta: float
) -> Estimates:
    """Advantages (and returns) of every token.

    Args:
        rewards: float64 (samples,), penalties included; NaN for samples that no reward applies to.
        beta: weight of the divergence at this step.
    """
    kl = _divergence(spec, scores)
    mask = counted_mask(spec, batch)
    scored = Scored(
        rewards=rewards,
        offsets=sample_offsets(batch),
        token_rewards=-beta * kl if kl is not None and spec.kl_in == "reward" else np.zeros(mask.shape),
        values=scores.values,
        mask=mask,
        turn_rewards=batch.token_columns.get("turn_rewards"),
    )
    found = advantages_of(advantage_spec(spec), scored)
    columns = {"advantages": found.advantages, "mask": mask}
    if scores.old_logps is not None:
        columns["old_logps"] = scores.old_logps
    if scores.ref_logps is not None:
        columns["ref_logps"] = scores.ref_logps
    if scores.values is not None and found.returns is not None:
        columns |= {"old_values": scores.values, "returns": found.returns}
    # A generation of fewer samples has fewer optimizer steps.
    optimizer_steps = -(-batch.n_rows // spec.batch_size)
    per_step = np.full(batch.n_rows, mask.sum() / optimizer_steps)
    metrics = {"advantages/std": float(found.advantages[mask].std()) if mask.any() else 0.0}
    engine = batch.token_columns["engine_logps"]
    if spec.corrected:
        assert scores.old_logps is not None
        how = spec.correction()
        bounded = importance_ratios(scores.old_logps, engine, sample_offsets(batch), mask, how)
        columns[CORRECTION] = bounded.ratio
        metrics |= bounded.metrics
    elif spec.clips_to_engine:
        columns["old_logps"] = engine
    batch = batch.with_token_columns(**columns).with_columns(tokens_per_step=per_step)
    if scores.values is not None and found.returns is not None:
        metrics["explained_variance"] = explained_variance(scores.values, found.returns, mask)
    signal, finite = found.advantages[mask], {"advantages": found.advantages}
    kept, of_samples = kept_samples(spec, batch), None
    if kl is not None:
        of_samples = float(sample_sums(batch, kl).mean())
        metrics |= {"kl": float(kl.mean()), "objective/kl": of_samples, "beta": beta}
    return Estimates(batch, of_samples, signal, kept, finite, metrics)


def teacher_tokens(spec: PolicyGradientStage, batch: Batch, scores: TokenScores) -> Estimates:
    """The teacher's most probable tokens as columns, and the divergence as the sampled tokens show it."""
    assert scores.old_logps is not None
    assert scores.ref_logps is not None
    assert scores.teacher_top is not None
    ids, logps = np.split(scores.teacher_top, 2, axis=1)
    mask, away = counted_mask(spec, batch), scores.old_logps - scores.ref_logps
    batch = batch.with_token_columns(
        **{TOP_IDS: ids.astype(np.int64), TOP_LOGPS: logps, "mask": mask, "old_logps": scores.old_logps}
    )
    of_samples = float(sample_sums(batch, away).mean())
    metrics = {"kl": float(away.mean()), "objective/kl": of_samples}
    return Estimates(batch, of_samples, away[mask], kept_samples(spec, batch), {}, metrics)


def counted_mask(spec: PolicyGradientStage, batch: Batch) -> np.ndarray:
    """bool (counted tokens,): tokens that train; those of cut samples don't where the stage says so."""
    return np.repeat(kept_samples(spec, batch), batch.label_counts)


def kept_samples(spec: PolicyGradientStage, batch: Batch) -> np.ndarray:
    """bool (samples,): False for cut ones, where the stage says that these don't train."""
    kept: np.ndarray = batch.columns["finished"] | (not spec.mask_truncated_completions)
    return kept


def advantage_spec(spec: PolicyGradientStage) -> AdvantageSpec:
    """The stage's settings that advantages depend on."""
    return AdvantageSpec.from_settings(spec, kind=spec.advantage)


def _divergence(spec: PolicyGradientStage, scores: TokenScores) -> np.ndarray | None:
    if scores.ref_logps is None:
        return None
    assert scores.old_logps is not None
    return kl_values(spec.kl_estimator, scores.old_logps, scores.ref_logps)

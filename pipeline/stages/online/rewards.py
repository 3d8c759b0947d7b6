"""Rewards of samples: reward functions and reward models behind one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.algorithms import (
    combine,
    reward_metrics,
    soft_overlong_punishment,
    without_eos_penalty,
)
from actors.batches import Batch, Generations
from actors.errors import InvariantViolation, RunFailure
from pipeline.data.tokens.prompts import PromptData
from pipeline.rewards.functions import Samples, settled
from pipeline.rewards.kept_answers import FILE, KeptAnswers
from pipeline.rewards.sources import source_of
from pipeline.rewards.spec import RewardSettings, reward_names
from pipeline.stages.views import Scorer

if TYPE_CHECKING:
    from actors.cluster import AgreedFuture
    from actors.trainer.remote import SharedBatch
    from pipeline.rewards.services import Judge
    from pipeline.stages.specs.registry import RlStage


@dataclass(frozen=True)
class Rewards:
    """Rewards of one step's samples."""

    values: np.ndarray
    """float64 (samples,): what advantages are made of, penalties included; NaN: no source applied."""
    metrics: dict[str, float]
    notes: list[str]
    """Values that a configured default stands in for, for the log."""


class RewardComputer:
    """All reward sources of a stage. Models score in their own processes, and services answer, while
    functions run here."""

    def __init__(
        self,
        spec: RlStage,
        models: Mapping[str, Scorer],
        directory: Path | None = None,
        judge: Judge | None = None,
    ) -> None:
        """`models`: by source; `directory`: the stage's, which keeps the answers of services; `judge`: the
        run's own, where a source asks it.

        Raises:
            UserError: as `source_of` says.
        """
        self.spec, self.models = spec, models
        self.names = reward_names(spec.rewards)
        kept = KeptAnswers(None if directory is None else directory / FILE)
        self._sources = [
            source_of(one, kept, judge) if one.reward_model not in models else None for one in spec.rewards
        ]

    def submit(self, batch: SharedBatch) -> dict[str, AgreedFuture[np.ndarray]]:
        """Let the reward models begin."""
        return {source: view.scores(batch) for source, view in self.models.items()}

    def result(
        self,
        pending: Mapping[str, AgreedFuture[np.ndarray]],
        prompts: PromptData,
        texts: Sequence[str],
        samples: Generations,
        batch: Batch,
    ) -> Rewards:
        """Rewards of all samples; `prompts` has one entry a sample.

        Raises:
            RunFailure: a source failed and its `on_error` is `stop`.
            InvariantViolation: a model's score is no finite number.
        """
        episodes = samples.episodes
        said = prompts.completions(texts) if episodes is None else [one.messages for one in episodes]
        asked = Samples(prompts.prompts, said, list(samples.sequences()), prompts.columns)
        rows, notes = [], []
        begun = [source.begin(asked) if source is not None else None for source in self._sources]
        for one, called in zip(self.spec.rewards, begun, strict=True):
            if called is None:
                assert one.reward_model is not None
                scores = pending[one.reward_model].result()
                check_scores(one, scores, asked)
                rows.append(scores)
                continue
            values, note = settled(one, called(), asked)
            rows.append(values)
            notes += [f"reward '{one.name}': {note}"] if note else []
        weights, names = [one.weight for one in self.spec.rewards], list(self.names)
        if (own := samples.earned) is not None:
            rows, weights, names = [*rows, own], [*weights, 1.0], [*names, self.spec.env_name]
        if not rows and not self.spec.needs_rewards:
            # A teacher scores tokens, which is no reward of samples.
            total, penalties = self._less_penalties(np.zeros(len(asked)), batch)
            return Rewards(total, penalties, notes)
        if not rows:
            raise RunFailure(
                f"environment '{self.spec.env_name}'", "rewards", "it gave no sample of the step a reward",
                "return one from `step` or `get_reward`, or name `rewards`",
            )  # fmt: skip
        found = np.stack(rows)
        total, penalties = self._less_penalties(combine(found, weights), batch)
        metrics = reward_metrics(names, found, weights, self.spec.num_generations, total) | penalties
        return Rewards(total, metrics, notes)

    def _less_penalties(self, total: np.ndarray, batch: Batch) -> tuple[np.ndarray, dict[str, float]]:
        """Rewards that advantages are made of, float64 (samples,), from the sums over the sources; and
        metrics of the penalties."""
        spec, metrics = self.spec, {}
        total = without_eos_penalty(total, batch.columns["finished"], spec.missing_eos_penalty)
        if spec.soft_punish_cache is not None:
            limit, cache = spec.max_completion_length, spec.soft_punish_cache
            punished = soft_overlong_punishment(batch.label_counts, limit, cache)
            metrics["rewards/overlong/mean"] = float(punished.mean())
            total = total + spec.soft_punish_weight * punished
        return total, metrics


def check_scores(spec: RewardSettings, scores: np.ndarray, samples: Samples) -> None:
    """Refuse a reward model's scores, float64 (samples,), that are no finite numbers. Unlike a function's
    None, a model's NaN is no way of passing a sample over.

    Raises:
        InvariantViolation: with the model, how many, the first value and its sample.
    """
    (bad,) = np.nonzero(~np.isfinite(scores))
    if len(bad):
        raise InvariantViolation(
            f"reward '{spec.name}'", "rewards", f"{len(bad)} of {len(scores)} values are not finite; the "
            f"first is {scores[bad[0]]} for sample {bad[0]}\n{samples.shown(int(bad[0]))}",
            f"{spec.says} is broken, or its dtype overflows on this text; score it with `raylign eval`",
        )  # fmt: skip

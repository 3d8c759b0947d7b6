"""Dynamic sampling: prompts whose samples all have the same reward make room for others (DAPO, arXiv
2503.14476, eq. 11). Their advantages would be 0, and the step's gradient that of fewer samples.

Which prompts take their places follows from (seed, step, round), and their samples from seeds of that round:
a step that is done again samples the same. What still has no spread after the last round stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.algorithms import without_spread
from actors.batches import Generations, trajectory_batch
from actors.cluster import Turns
from pipeline.stages.online.rewards import Rewards
from pipeline.stages.online.sampler import SampledBatch, Sampler
from pipeline.stages.views import put

if TYPE_CHECKING:
    from actors.rollout.pool import RolloutPool
    from pipeline.stages.online.rewards import RewardComputer
    from pipeline.stages.prepared import PreparedRl


@dataclass(frozen=True)
class Scored:
    """Samples of some prompts with their rewards."""

    rows: np.ndarray
    """int64 (prompts,)."""
    samples: Generations
    values: np.ndarray
    """float64 (samples,): as `Rewards.values`."""

    def zero_spread(self) -> np.ndarray:
        """bool (prompts,): those without any spread."""
        return without_spread(self.values, self.samples.n)

    def with_groups(self, places: np.ndarray, other: Scored, taken: np.ndarray) -> Scored:
        """Groups `taken` of `other` at `places`; both int64, of one length."""
        source = np.arange(len(self.rows))
        source[places] = len(self.rows) + taken
        joined = Generations.join([self.samples, other.samples], self.samples.n, mixed=True)
        n = self.samples.n
        samples = (source[:, None] * n + np.arange(n)).reshape(-1)
        values = np.concatenate([self.values, other.values])[samples]
        return Scored(np.concatenate([self.rows, other.rows])[source], joined.select(samples), values)


class DynamicSampler(Sampler):
    """A sampler that replaces groups whose rewards have no spread, in `max_resampling_rounds` rounds."""

    def sample(self, step: int) -> SampledBatch:
        """The step's samples with the groups replaced that have no spread, as far as the rounds go.

        Reward metrics are those of the first round: of the step's own prompts, none of them chosen.
        """
        sampled = super().sample(step)
        first = self._score(sampled.rows, sampled.samples)
        found = Scored(sampled.rows, sampled.samples, first.values)
        notes, used, rounds = list(first.notes), set(sampled.rows.tolist()), 0
        for attempt in range(1, self.stage.spec.max_resampling_rounds + 1):
            (places,) = np.nonzero(found.zero_spread())
            if not len(places):
                break
            seed = (self.stage.seed, step, attempt)
            rows = substitutes(self.stage.data.n_rows, used, len(places), seed)
            if not len(rows):
                break
            used |= set(rows.tolist())
            samples = self.ask(step, rows, attempt)
            rewards = self._score(rows, samples)
            notes += rewards.notes
            more, rounds = Scored(rows, samples, rewards.values), attempt
            (good,) = np.nonzero(~more.zero_spread())
            found = found.with_groups(places[: len(good)], more, good)
        metrics = first.metrics | {
            "dynamic_sampling/rounds": float(rounds),
            "dynamic_sampling/prompts": float(len(used)),
            "dynamic_sampling/frac_zero_std_left": float(found.zero_spread().mean()),
        }
        final = self.batch_of(found.rows, found.samples, Rewards(found.values, {}, notes))
        loads = [load for load in (sampled.expert_load, final.expert_load) if load is not None]
        return replace(final, metrics=metrics, expert_load=sum(loads[1:], loads[0]) if loads else None)

    def _score(self, rows: np.ndarray, samples: Generations) -> Rewards:
        prompts = self.stage.data.of_samples(rows, samples)
        batch = trajectory_batch(prompts.token_ids, samples)
        if self.rewards.models:
            self.turns.to_policy()
        asked = self.rewards.submit(put(batch.unrouted())) if self.rewards.models else {}
        return self.rewards.result(asked, prompts, self.texts(samples), samples, batch)


def sampler_of(
    stage: PreparedRl,
    rollout: RolloutPool,
    rewards: RewardComputer,
    tokenizer: Any,
    turns: Turns | None = None,
) -> Sampler:
    """The sampler that a stage's settings ask for; `turns`: where policy and engines share a device."""
    kind = DynamicSampler if stage.spec.max_resampling_rounds else Sampler
    return kind(stage, rollout, rewards, tokenizer, turns)


def substitutes(n_rows: int, used: set[int], wanted: int, seed: tuple[int, int, int]) -> np.ndarray:
    """int64: up to `wanted` rows that the step has not used yet, in an order that follows from the seed.

    Fewer where the data have no more of them: none when every row was used.
    """
    free = np.setdiff1d(np.arange(n_rows), np.fromiter(used, np.int64, len(used)))
    return np.random.default_rng(seed).permutation(free)[:wanted]

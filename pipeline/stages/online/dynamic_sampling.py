"""Dynamic sampling: prompts whose samples all have the same reward make room for others (DAPO, arXiv
2503.14476, eq. 11). Their advantages would be 0, and the step's gradient that of fewer samples.

Which prompts take their places follows from (seed, step, round), and their samples from seeds of that round:
a step that is done again draws the same. What still has no spread after the last round stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from actors.algorithms.reward_shaping import without_spread
from actors.batches.generations import Generations
from actors.batches.trajectories import trajectories
from pipeline.stages.online.rewards import Rewards
from pipeline.stages.views import put

if TYPE_CHECKING:
    from pipeline.stages.online.sampler import Drawer, Drawn


@dataclass(frozen=True)
class Judged:
    """Samples of some prompts with their rewards."""

    rows: np.ndarray
    """int64 (prompts,)."""
    samples: Generations
    values: np.ndarray
    """float64 (samples,): as `Rewards.values`."""

    def dull(self) -> np.ndarray:
        """bool (prompts,): those without any spread."""
        return without_spread(self.values, self.samples.n)

    def with_groups(self, places: np.ndarray, other: Judged, taken: np.ndarray) -> Judged:
        """Groups `taken` of `other` at `places`; both int64, of one length."""
        source = np.arange(len(self.rows))
        source[places] = len(self.rows) + taken
        joined = Generations.join([self.samples, other.samples], self.samples.n, mixed=True)
        n = self.samples.n
        samples = (source[:, None] * n + np.arange(n)).reshape(-1)
        values = np.concatenate([self.values, other.values])[samples]
        return Judged(np.concatenate([self.rows, other.rows])[source], joined.select(samples), values)


def draw_again(drawer: Drawer, step: int, drawn: Drawn) -> Drawn:
    """The step's samples with the groups replaced that have no spread, as far as the rounds go.

    Reward metrics are those of the first round: of the step's own prompts, none of them chosen.
    """
    spec = drawer.stage.spec
    first = judge(drawer, drawn.rows, drawn.samples)
    found = Judged(drawn.rows, drawn.samples, first.values)
    notes, used, rounds = list(first.notes), set(drawn.rows.tolist()), 0
    for attempt in range(1, spec.max_resampling_rounds + 1):
        (places,) = np.nonzero(found.dull())
        if not len(places):
            break
        rows = substitutes(drawer.stage.data.n_rows, used, len(places), (drawer.stage.seed, step, attempt))
        if not len(rows):
            break
        used |= set(rows.tolist())
        samples = drawer.ask(step, rows, attempt)
        rewards = judge(drawer, rows, samples)
        notes += rewards.notes
        more, rounds = Judged(rows, samples, rewards.values), attempt
        (good,) = np.nonzero(~more.dull())
        found = found.with_groups(places[: len(good)], more, good)
    metrics = first.metrics | {
        "dynamic_sampling/rounds": float(rounds),
        "dynamic_sampling/prompts": float(len(used)),
        "dynamic_sampling/frac_zero_std_left": float(found.dull().mean()),
    }
    final = drawer.drawn(found.rows, found.samples, Rewards(found.values, {}, notes))
    loads = [load for load in (drawn.expert_load, final.expert_load) if load is not None]
    return replace(final, metrics=metrics, expert_load=sum(loads[1:], loads[0]) if loads else None)


def judge(drawer: Drawer, rows: np.ndarray, samples: Generations) -> Rewards:
    """What the samples of these rows are worth."""
    data = drawer.stage.data
    prompts = data.select(rows, copies=samples.n)
    batch = trajectories(prompts.token_ids, samples)
    asked = drawer.judge.submit(put(batch.unrouted())) if drawer.judge.models else {}
    texts = drawer.texts(samples)
    return drawer.judge.result(asked, prompts, texts, samples, batch)


def substitutes(n_rows: int, used: set[int], wanted: int, seed: tuple[int, int, int]) -> np.ndarray:
    """int64: up to `wanted` rows that the step has not drawn yet, in an order that follows from the seed.

    Fewer where the data have no more of them: none when every row was drawn.
    """
    free = np.setdiff1d(np.arange(n_rows), np.fromiter(used, np.int64, len(used)))
    return np.random.default_rng(seed).permutation(free)[:wanted]

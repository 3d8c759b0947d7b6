"""Samples of a step, from the engines, now or while earlier steps train.

With `staleness` S the samples of step k come from version max(0, k - S) of the policy: when step k begins,
the engines are told to sample all steps up to k + S, and before they get version k + 1 they have done so. The
schedule is a function of k alone, so a repeated run samples the same; what was sampled for later steps goes
into the checkpoint, because the weights that it came from are gone.

With `sync.in_flight: keep` new weights don't wait for that: samples go on with them, and the steps' samples
are in the engines together. Which weights sample which token then depends on time.
"""

from __future__ import annotations

import json
import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.batches import Generations, sample_seed
from actors.cluster import Turns, look_up
from actors.errors import RunFailure
from pipeline.data.tokens.prompts import PromptData
from pipeline.environments.playing import Player
from pipeline.stages.online.rewards import Rewards
from pipeline.stages.prepared import PreparedRl

if TYPE_CHECKING:
    from actors.rollout.pool import RolloutPool
    from pipeline.stages.online.rewards import RewardComputer

LOOK_UP_S = 0.5
"""Longest wait for a batch without a look at what else there is to do."""


@dataclass(frozen=True)
class SampledBatch:
    """The samples of one step."""

    rows: np.ndarray
    """int64 (prompts,): rows of the stage's data."""
    prompts: PromptData
    """One entry a sample."""
    samples: Generations
    expert_load: np.ndarray | None = None
    """int64 (layers, experts): tokens per expert in the engines, while they sampled; None: not counted."""
    rewards: Rewards | None = None
    """Rewards, where sampling had to know them; else the step asks for them."""
    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Sampler:
    """Gets the samples of a step: a pure function of the step and of the weights that the engines hold.

    Called from a thread of its own while the policy trains: it touches nothing of the loop's state.
    """

    def __init__(
        self,
        stage: PreparedRl,
        rollout: RolloutPool,
        rewards: RewardComputer,
        tokenizer: Any,
        turns: Turns | None = None,
    ) -> None:
        self.stage, self.rollout, self.rewards, self.tokenizer = stage, rollout, rewards, tokenizer
        self.turns = turns or Turns()
        self._count_experts = True
        self._player = None if stage.conversing is None else Player(stage.conversing, tokenizer)

    def sample(self, step: int) -> SampledBatch:
        """Raises: RunFailure, InvariantViolation: as `RolloutPool.generate`."""
        return self.batch_of(self.stage.order[step], self.ask(step, self.stage.order[step]))

    def ask(self, step: int, rows: np.ndarray, attempt: int = 0) -> Generations:
        """`num_generations` samples of each of these rows.

        A sample's seed is a hash of run, stage, step, row, number and attempt, so that it doesn't matter
        which engine generates it. Numbers of a row that comes again go on after those before.
        """
        stage, n = self.stage, self.stage.spec.num_generations
        seeds, asked_before = [], Counter[int]()
        for row in map(int, rows):
            numbers = range(asked_before[row], asked_before[row] + n)
            seeds += [sample_seed(stage.seed, step, row, i, stage.name, attempt) for i in numbers]
            asked_before[row] += n
        asked = [stage.data.token_ids[row] for row in rows]
        self.turns.to_engines()
        if self._player is not None:
            # Samples of one prompt share the seed of their environments, for they are compared.
            of_prompts = [seeds[i - i % n] for i in range(len(seeds))]
            prompts = stage.data.select(rows, copies=n)
            return self._player.play(self.rollout, prompts, stage.sampling, seeds, of_prompts)
        return self.rollout.generate(asked, stage.sampling, seeds)

    def texts(self, samples: Generations) -> list[str]:
        """As `Generations.texts`."""
        asked = self.stage.sampling
        return samples.texts(self.tokenizer, asked.stop, asked.stop_token_ids)

    def batch_of(
        self, rows: np.ndarray, samples: Generations, rewards: Rewards | None = None
    ) -> SampledBatch:
        """Samples of these rows with their prompts."""
        prompts = self.stage.data.of_samples(rows, samples, self.stage.spec.num_generations)
        return SampledBatch(np.asarray(rows, np.int64), prompts, samples, self._expert_load(), rewards)

    def _expert_load(self) -> np.ndarray | None:
        """Engines count each prompt once, and all that they generate and score between two calls."""
        if not self._count_experts:
            return None
        try:
            loads = self.rollout.expert_load()
        except RunFailure:  # An engine is gone: whoever needs it next replaces it.
            return None
        self._count_experts = bool(loads)  # Engines of a dense model never do: not to be asked each step.
        return sum(loads[1:], loads[0]) if loads else None


class Prefetcher:
    """Batches of later steps, sampled in order by a thread of their own, or together by one each."""

    def __init__(
        self, sample: Callable[[int], SampledBatch], staleness: int, steps: int, *, together: bool = False
    ) -> None:
        """`steps`: of the whole stage; `together`: a batch need not wait for the one before it."""
        self._sample, self.staleness, self.steps, self.together = sample, staleness, steps, together
        self._batches: dict[int, Future[SampledBatch]] = {}
        self._asked: queue.SimpleQueue[tuple[int, Future[SampledBatch]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._before: dict[int, Future[SampledBatch]] = {}
        """Batches that were there, or under way, before the last `take`."""

    def take(self, step: int) -> SampledBatch:
        """The batch of a step, once it is there; sampling of later ones begins.

        Raises: what sampling raised.
        """
        self._before = dict(self._batches)
        if not self.staleness:
            return self._sample(step)
        for later in range(step, min(step + self.staleness, self.steps - 1) + 1):
            if later not in self._batches:
                self._batches[later] = Future()
                self._asked.put((later, self._batches[later]))
                self._awake()
        taken = self._batches.pop(step)
        while not taken.done():
            look_up()
            wait([taken], LOOK_UP_S)
        return taken.result()

    def settle(self) -> None:
        """Wait until all that was asked for is sampled. Raises: what sampling raised."""
        for batch in self._batches.values():
            batch.result()

    def save(self, directory: Path, *, before: bool = False) -> None:
        """Write every batch that was sampled for a later step; `before`: as before the last `take`, but for
        what engines still sample, which other weights may have changed (`in_flight: keep`)."""
        there = self._batches
        if before:
            there = {step: batch for step, batch in self._before.items() if batch.done()}
        for step, batch in there.items():
            save_sampled(directory / f"drawn-{step}.safetensors", batch.result())

    def load(self, directory: Path, data: PromptData) -> None:
        """Read back what `save` wrote."""
        for path in sorted(directory.glob("drawn-*.safetensors")):
            step = int(path.stem.removeprefix("drawn-"))
            self._batches[step] = Future()
            self._batches[step].set_result(load_sampled(path, data))

    def _awake(self) -> None:
        if self._thread is None or self.together:
            # A daemon: a run that fails doesn't wait for samples that nobody needs.
            self._thread = threading.Thread(target=self._work, daemon=True, name="prefetch")
            self._thread.start()

    def _work(self) -> None:
        while True:
            try:
                step, batch = self._asked.get(block=not self.together)
            except queue.Empty:
                return
            try:
                batch.set_result(self._sample(step))
            except BaseException as error:
                batch.set_exception(error)


def save_sampled(path: Path, sampled: SampledBatch) -> None:
    """One batch as a safetensors file, its prompts by row.

    Rewards are kept where sampling had to know them: models that score the same samples in other company give
    other last digits.
    """
    from safetensors.numpy import save

    samples = sampled.samples
    arrays = {f"samples.{name}": value for name, value in samples.arrays().items()} | {"rows": sampled.rows}
    if sampled.expert_load is not None:
        arrays["expert_load"] = sampled.expert_load
    more = {"n": samples.n, "label": samples.label, "seconds": samples.seconds}
    if samples.episodes is not None:
        more["episodes"] = [vars(one) for one in samples.episodes]
    more |= {"metrics": sampled.metrics, "notes": list(sampled.notes)}
    if sampled.rewards is not None:
        arrays["rewards"] = sampled.rewards.values
        more["rewards"] = [sampled.rewards.metrics, sampled.rewards.notes]
    whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    # Not `save_file`, which makes a file that nobody else can read.
    path.write_bytes(save(whole, _encoded(more)))


def load_sampled(path: Path, data: PromptData) -> SampledBatch:
    """The batch that `save_sampled` wrote; `data`: the stage's prompts."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        more = json.loads(file.metadata()["drawn"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    of_samples = {
        name.removeprefix("samples."): value for name, value in arrays.items() if name.startswith("samples.")
    }
    samples = Generations.from_arrays(
        of_samples, more["n"], more["label"], more["seconds"], more.get("episodes")
    )
    prompts = data.of_samples(arrays["rows"], samples)
    load, notes = arrays.get("expert_load"), tuple(more["notes"])
    rewards = Rewards(arrays["rewards"], *more["rewards"]) if "rewards" in arrays else None
    return SampledBatch(arrays["rows"], prompts, samples, load, rewards, more["metrics"], notes)


def _encoded(more: dict[str, object]) -> dict[str, str]:
    return {"drawn": json.dumps(more)}

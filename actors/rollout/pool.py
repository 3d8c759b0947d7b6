"""Engines that share the samples of one call: whoever is free takes the next chunk.

- A sample is decided by its prompt, its seed and the weights alone; which engine makes it, with which others,
  in which order or when, changes nothing.
- Every sample is in exactly one place: queued, with one engine, or done.
- An engine that dies or overruns its deadline is replaced while the others go on (`EngineSet.replace`); its
  chunk goes back to the front of the queue. A call returns only when every engine that it lost serves again.
- Several calls may go on at once, from threads of the caller, where engines generate in slices: an engine
  then advances the samples of all of them together.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from actors.batches.generations import Generations, SamplingSpec
from actors.cluster.futures import POLL_S, WorkerFuture, first_done
from actors.errors import InvariantViolation, RunFailure
from actors.rollout.remote import RolloutEngines
from actors.sync.engine_set import EngineSet, Replacement, Restart
from actors.sync.engine_state import WeightsState

if TYPE_CHECKING:
    import numpy as np

MAX_RESTARTS = 2
"""Restarts of one engine within one call. A third loss is no accident: something in the call kills it."""

SLICE_S = 0.1
"""Seconds for which an engine generates before it looks at other calls, where samples stay in flight. A call
costs 1 to 2 ms, so a slice loses 2 %; new weights wait for half of one on average, at each of their calls."""

WHOLE = "a whole chunk"
"""Name of the time that an engine has for a chunk, in however many slices."""

MIN_CHUNK = 16
"""Samples per chunk, at least (but for the last). A decoding step of a small batch takes as long as one of
a larger batch, so smaller chunks would cost more than the idle time that they save."""


@dataclass(frozen=True)
class Chunk:
    """Samples `start` to `stop` (exclusive) of a call."""

    start: int
    stop: int


class Queue:
    """Samples that no engine has yet. The first chunks are large, the last ones small, so that all engines
    end at nearly the same time (guided self-scheduling, Polychronopoulos & Kuck 1987)."""

    def __init__(self, samples: int, engines: int) -> None:
        self._next, self._samples, self._engines = 0, samples, engines
        self._returned: list[Chunk] = []

    def __bool__(self) -> bool:
        return bool(self._returned) or self._next < self._samples

    def take(self) -> Chunk:
        """The next chunk: a returned one, else half of an engine's fair share of what is left.

        A single engine takes all: it has nobody to share with, and one large batch is the fastest.
        """
        if self._returned:
            return self._returned.pop(0)
        left = self._samples - self._next
        share = left if self._engines == 1 else -(-left // (2 * self._engines))
        chunk = Chunk(self._next, min(self._samples, self._next + max(MIN_CHUNK, share)))
        self._next = chunk.stop
        return chunk

    def give_back(self, chunk: Chunk) -> None:
        """The engine that had it is lost."""
        self._returned.append(chunk)


@dataclass(frozen=True)
class Assigned:
    """A chunk that an engine is working on."""

    chunk: Chunk
    answer: WorkerFuture[Generations] | WorkerFuture[Generations | None]
    since: float
    """time.monotonic()"""
    generation: int
    """Of the engine that got it."""
    key: int
    """Names the chunk in the engine, where it generates in slices."""


@dataclass
class Call:
    """State of one call of `RolloutPool.generate`."""

    requests: list[Sequence[int]]
    """Prompt of every sample."""
    sampling: SamplingSpec
    seeds: Sequence[int]
    queue: Queue
    assigned: dict[int, Assigned] = field(default_factory=dict)
    """By rank, as are the next two."""
    replacing: dict[int, Replacement] = field(default_factory=dict)
    """Engines that this call waits for."""
    restarts: Counter[int] = field(default_factory=Counter)
    parts: dict[int, Generations] = field(default_factory=dict)
    """By first sample."""

    @property
    def open(self) -> bool:
        return bool(self.queue or self.assigned or self.replacing)


class RolloutPool:
    """The engines of a rollout group as one engine."""

    def __init__(self, engines: EngineSet, *, in_flight: bool = False) -> None:
        """`in_flight`: engines generate in slices, so that weights can change while samples are in flight."""
        self.engines, self.group, self.in_flight = engines, engines.group, in_flight
        self._calls = RolloutEngines(self.group)
        self._keys = itertools.count()

    @property
    def restarts(self) -> list[Restart]:
        """Engines that were replaced in all calls so far."""
        return self.engines.restarts

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec, seeds: Sequence[int]
    ) -> Generations:
        """`sampling.n` samples of each prompt (token ids), in prompt order; `seeds`: one per sample.

        `seconds` of the result adds up the engines' time.

        Raises:
            UserError: a prompt leaves no room for an answer.
            InvariantViolation: the engines serve different weights (where none are in flight).
            RunFailure: an engine was lost once more than `MAX_RESTARTS`, failed otherwise, or none serves.
        """
        requests = [prompt for prompt in prompts for _ in range(sampling.n)]
        if len(seeds) != len(requests):
            raise ValueError(f"{len(seeds)} seeds for {len(requests)} samples")
        one_each = sampling.model_copy(update={"n": 1})
        call = Call(requests, one_each, seeds, Queue(len(requests), self.group.size))
        self._replace_lost(call)
        while call.open:
            self._hand_out(call)
            self._collect(call)
            self._rejoin(call)
        return self._joined(call, sampling.n)

    def expert_load(self) -> list[np.ndarray]:
        """int64 (layers, experts) of each engine that counts: tokens of each expert since the last call.

        Raises:
            RunFailure: an engine is gone.
        """
        return [load for load in self._calls.expert_load().result() if load is not None]

    # --- One turn of a call ---------------------------------------------------------------------

    def _hand_out(self, call: Call) -> None:
        for rank in self.engines:
            if call.queue and rank not in call.assigned and self.engines.ready(rank, unproved=self.in_flight):
                self._send(call, rank, call.queue.take())
        if call.queue and not (call.assigned or call.replacing):
            self._find_engines(call)

    def _find_engines(self, call: Call) -> None:
        """Nobody works for this call and nobody is awaited: wait for engines that others are busy with.

        Raises:
            RunFailure: there are none.
        """
        self._replace_lost(call)
        engines = {rank: self.engines[rank] for rank in self.engines}
        for rank in engines:
            replacement = self.engines.running(rank)
            if replacement is not None:
                call.replacing[rank] = replacement
        syncing = any(e.state in (WeightsState.STAGED, WeightsState.COMMITTED) for e in engines.values())
        if call.replacing or any(self.engines.ready(rank, unproved=self.in_flight) for rank in engines):
            return
        if not syncing and not self.engines.lost():
            states = ", ".join(f"{self.group.who(rank)} is {e.state}" for rank, e in engines.items())
            raise RunFailure(self.group.name, "generate", f"no engine serves: {states}", self.group.next_step)
        time.sleep(POLL_S)

    def _send(self, call: Call, rank: int, chunk: Chunk) -> None:
        part, key = slice(chunk.start, chunk.stop), next(self._keys)
        generation = self.engines[rank].generation
        prompts, sampling, seeds = call.requests[part], call.sampling, call.seeds[part]
        answer: WorkerFuture[Generations] | WorkerFuture[Generations | None]
        try:
            if self.in_flight:
                answer = self.engines.submit(
                    rank,
                    generation,
                    lambda r: self._calls.start_requests(r, key, SLICE_S, prompts, sampling, seeds),
                )
            else:
                answer = self.engines.submit(
                    rank, generation, lambda r: self._calls.generate(r, prompts, sampling, seeds)
                )
        except RunFailure as failure:  # Another thread has just seen it die.
            call.queue.give_back(chunk)
            self._replace(call, rank, generation, failure.reason)
            return
        call.assigned[rank] = Assigned(chunk, answer, time.monotonic(), generation, key)

    def _collect(self, call: Call) -> None:
        """Wait a moment for answers, take those that are there, and give up on those that are overdue."""
        limit = self.group.limit("generate", WHOLE)
        done = first_done({rank: one.answer for rank, one in call.assigned.items()}, POLL_S)
        for rank, assigned in list(call.assigned.items()):
            waited = time.monotonic() - assigned.since
            if rank in done:
                self._take(call, rank, assigned)
            elif assigned.generation != self.engines[rank].generation:
                self._lost(call, rank, RunFailure(self.group.who(rank), "generate", "it was replaced"))
            elif waited > limit:
                self._lost(call, rank, self.group.overrun(rank, "generate", waited))

    def _take(self, call: Call, rank: int, assigned: Assigned) -> None:
        try:
            made = assigned.answer.result()
            if made is None:
                again = self.engines.submit(
                    rank, assigned.generation, lambda r: self._calls.poll(r, assigned.key, SLICE_S)
                )
                call.assigned[rank] = replace(assigned, answer=again)
                return
        except RunFailure as failure:
            self._lost(call, rank, failure)
        else:
            if self.group.measured is not None:
                waited = time.monotonic() - assigned.since
                self.group.measured.took(self.group.name, "generate", WHOLE, waited)
            call.parts[assigned.chunk.start] = made
            del call.assigned[rank]

    def _lost(self, call: Call, rank: int, failure: RunFailure) -> None:
        """Queue a lost engine's chunk again. One that lives has failed by itself: that ends the call."""
        assigned = call.assigned[rank]
        if self.engines.is_alive(rank, assigned.generation):
            raise failure
        call.queue.give_back(call.assigned.pop(rank).chunk)
        self._replace(call, rank, assigned.generation, failure.reason)

    # --- Engines that are replaced --------------------------------------------------------------

    def _replace_lost(self, call: Call) -> None:
        for rank in self.engines.lost():
            engine = self.engines[rank]
            self._replace(call, rank, engine.generation, engine.reason)

    def _replace(self, call: Call, rank: int, generation: int, reason: str) -> None:
        """Have an engine replaced that was lost in this generation, unless that is under way."""
        call.restarts[rank] += 1
        if call.restarts[rank] > MAX_RESTARTS:
            raise RunFailure(
                self.group.who(rank),
                "generate",
                f"{reason}, once more after {MAX_RESTARTS} restarts in one call",
                self.group.next_of(rank),
            )
        call.replacing[rank] = self.engines.replace(rank, generation, reason)

    def _rejoin(self, call: Call) -> None:
        """Take back engines that were replaced; waits only where nothing else is going on."""
        if call.replacing and not call.assigned:
            wait([replacement.done for replacement in call.replacing.values()], POLL_S, FIRST_COMPLETED)
        for rank, replacement in list(call.replacing.items()):
            if not replacement.done.done():
                continue
            del call.replacing[rank]
            error = replacement.done.exception()
            if error is None:
                continue
            if self.engines.is_alive(rank, replacement.generation):
                raise error
            self._replace(call, rank, replacement.generation, self.engines[rank].reason or str(error))

    def _joined(self, call: Call, n: int) -> Generations:
        parts = [call.parts[start] for start in sorted(call.parts)]
        try:
            return Generations.join(parts, n, mixed=self.in_flight)
        except ValueError as error:
            raise InvariantViolation(self.group.name, "generate", str(error), self.group.next_step) from None

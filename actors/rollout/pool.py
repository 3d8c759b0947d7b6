"""Engines that share the samples of one call: whoever is free takes the next chunk.

- A sample is decided by its prompt, its seed and the weights alone, so which engine draws it, in which
  company, in which order, or for which time, changes nothing.
- Every sample is in exactly one place: still queued, with one engine, or done.
- An engine that dies or overruns its deadline is replaced while the others go on; its chunk goes back to the
  front of the queue. A call returns only when every engine that it lost serves again.
- Several calls may go on at once, from threads of the caller, where engines draw in slices: an engine then
  advances the samples of all of them together. Whoever sees an engine lost first has it replaced.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace

from actors.batches.generations import Generations, SamplingSpec
from actors.cluster.futures import POLL_S, WorkerFuture, first_done
from actors.cluster.health import ProcessState
from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation, RunFailure

MAX_RESTARTS = 2
"""Restarts of one engine within one call. A third loss is no accident: something in the call kills it."""

SLICE_S = 0.1
"""Seconds for which an engine draws before it looks at other calls, where samples stay in flight. A call
costs 1 to 2 ms, so a slice loses 2 %; new weights wait for half of one on average, at each of their calls."""

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
class Restart:
    """An engine that was replaced."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Assigned:
    """A chunk that an engine is working on."""

    chunk: Chunk
    answer: WorkerFuture
    since: float
    """time.monotonic()"""
    life: int
    """Of the process that got it: restarts of this rank until then."""
    key: int
    """Names the chunk in the engine, where it draws in slices."""


@dataclass(frozen=True)
class Replacement:
    """A fresh engine on its way to the current weights."""

    life: int
    """Restarts of this rank, this one included."""
    done: Future[None]


@dataclass
class Call:
    """What one call of `RolloutPool.generate` knows."""

    requests: list[Sequence[int]]
    """Prompt of every sample."""
    sampling: SamplingSpec
    seeds: Sequence[int]
    queue: Queue
    sent: dict[int, Assigned] = field(default_factory=dict)
    """By rank, as are the next two."""
    replacing: dict[int, Replacement] = field(default_factory=dict)
    """Engines that this call waits for."""
    restarts: Counter[int] = field(default_factory=Counter)
    parts: dict[int, Generations] = field(default_factory=dict)
    """By first sample."""

    @property
    def open(self) -> bool:
        return bool(self.queue or self.sent or self.replacing)


class RolloutPool:
    """The engines of a rollout group as one engine."""

    def __init__(
        self, group: WorkerGroup, replace: Callable[[int], None], *, in_flight: bool = False
    ) -> None:
        """`revive(rank)`: give a fresh engine (built, empty) the current weights. It is called from another
        thread, for one rank at a time, and never outside of `generate`.

        `in_flight`: engines draw in slices, so that weights can change while samples are in flight."""
        self.group, self.in_flight = group, in_flight
        self.restarts: list[Restart] = []
        """Of all calls so far."""
        self._bring_back = replace
        self._one_revival, self._replacing = threading.Lock(), threading.Lock()
        self._replacements: dict[int, Replacement] = {}
        """The latest of each rank."""
        self._keys = itertools.count()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec, seeds: Sequence[int]
    ) -> Generations:
        """`sampling.n` samples of each prompt (token ids), in prompt order; `seeds`: one per sample.

        `seconds` of the result adds up the engines' time.

        Raises:
            UserError: a prompt leaves no room for an answer.
            InvariantViolation: the engines serve different weights (where none are in flight).
            RunFailure: an engine was lost once more than `MAX_RESTARTS`, or failed otherwise.
        """
        requests = [prompt for prompt in prompts for _ in range(sampling.n)]
        if len(seeds) != len(requests):
            raise ValueError(f"{len(seeds)} seeds for {len(requests)} samples")
        one_each = sampling.model_copy(update={"n": 1})
        call = Call(requests, one_each, seeds, Queue(len(requests), self.group.size))
        for rank in self.group.fleet.ranks(ProcessState.SUSPECT, ProcessState.DEAD):
            self._replace(call, rank, self._life(rank), self.group.fleet.members[rank].reason)
        while call.open:
            self._hand_out(call)
            self._collect(call)
            self._rejoin(call)
        return self._joined(call, sampling.n)

    def bring_back(self, rank: int) -> None:
        """Have an engine that was seen dead replaced and revived, unless that is under way; waits for it.

        Raises: what `replace` raised.
        """
        member = self.group.fleet.members[rank]
        if rank not in self.group.fleet.serving:
            self._replacement_of(rank, member.generation, member.reason)
        replacement = self._replacements.get(rank)
        if replacement is not None:
            replacement.done.result()

    # --- One turn of a call ---------------------------------------------------------------------

    def _hand_out(self, call: Call) -> None:
        for rank in self.group.fleet.serving:
            if call.queue and rank not in call.sent and self._is_up(rank):
                self._send(call, rank, call.queue.take())

    def _is_up(self, rank: int) -> bool:
        replacement = self._replacements.get(rank)
        return replacement is None or (replacement.done.done() and replacement.done.exception() is None)

    def _send(self, call: Call, rank: int, chunk: Chunk) -> None:
        part, life, key = slice(chunk.start, chunk.stop), self._life(rank), next(self._keys)
        asked = call.requests[part], call.sampling, call.seeds[part]
        try:
            if self.in_flight:
                answer = self.group.submit_rank(
                    rank, "start_requests", key, SLICE_S, *asked, phase="generate"
                )
            else:
                answer = self.group.submit_rank(rank, "generate", *asked, phase="generate")
        except RunFailure as failure:  # Another thread has just seen it die.
            call.queue.give_back(chunk)
            self._replace(call, rank, life, failure.reason)
            return
        call.sent[rank] = Assigned(chunk, answer, time.monotonic(), life, key)

    def _life(self, rank: int) -> int:
        return self.group.fleet.members[rank].generation

    def _collect(self, call: Call) -> None:
        """Wait a moment for answers, take those that are there, and give up on those that are overdue."""
        limit = self.group.limits.of("generate")
        done = first_done({rank: sent.answer for rank, sent in call.sent.items()}, POLL_S)
        for rank, sent in list(call.sent.items()):
            waited = time.monotonic() - sent.since
            if rank in done:
                self._take(call, rank, sent)
            elif sent.life != self._life(rank):
                self._lost(call, rank, RunFailure(self.group.who(rank), "generate", "it was replaced"))
            elif waited > limit:
                self._lost(call, rank, self.group.overrun(rank, "generate", waited))

    def _take(self, call: Call, rank: int, sent: Assigned) -> None:
        try:
            made = sent.answer.result()
            if made is None:
                again = self.group.submit_rank(rank, "poll", sent.key, SLICE_S, phase="generate")
                call.sent[rank] = replace(sent, answer=again)
                return
        except RunFailure as failure:
            self._lost(call, rank, failure)
        else:
            call.parts[sent.chunk.start] = made
            del call.sent[rank]

    def _lost(self, call: Call, rank: int, failure: RunFailure) -> None:
        """Queue a lost engine's chunk again. One that lives has failed by itself: that ends the call."""
        sent = call.sent[rank]
        if rank in self.group.fleet.serving and sent.life == self._life(rank):
            raise failure
        call.queue.give_back(call.sent.pop(rank).chunk)
        self._replace(call, rank, sent.life, failure.reason)

    def _rejoin(self, call: Call) -> None:
        """Take back revived engines; waits only where nothing else is going on."""
        if call.replacing and not call.sent:
            wait([replacement.done for replacement in call.replacing.values()], POLL_S, FIRST_COMPLETED)
        for rank, replacement in list(call.replacing.items()):
            if not replacement.done.done():
                continue
            del call.replacing[rank]
            error = replacement.done.exception()
            if error is None:
                continue
            if replacement.life == self._life(rank) and rank in self.group.fleet.serving:
                raise error
            self._replace(call, rank, replacement.life, self.group.fleet.members[rank].reason or str(error))

    # --- Replacing an engine --------------------------------------------------------------------

    def _replace(self, call: Call, rank: int, life: int, reason: str) -> None:
        """Have the process of a rank replaced that was lost in its `life`, unless that is under way."""
        call.restarts[rank] += 1
        if call.restarts[rank] > MAX_RESTARTS:
            raise RunFailure(
                self.group.who(rank),
                "generate",
                f"{reason}, once more after {MAX_RESTARTS} restarts in one call",
                self.group.next_of(rank),
            )
        call.replacing[rank] = self._replacement_of(rank, life, reason)

    def _replacement_of(self, rank: int, life: int, reason: str) -> Replacement:
        with self._replacing:
            if self._life(rank) == life:
                self.restarts.append(Restart(rank, reason))
                self.group.restart(rank)
                self._replacements[rank] = self._replace_aside(rank)
            return self._replacements[rank]

    def _replace_aside(self, rank: int) -> Replacement:
        replacement = Replacement(self._life(rank), Future())
        # A daemon: a run that ends for another reason doesn't wait for an engine that nobody needs.
        threading.Thread(
            target=self._bring_up, args=(rank, replacement.done), daemon=True, name=f"replace-{rank}"
        ).start()
        return replacement

    def _bring_up(self, rank: int, done: Future[None]) -> None:
        try:
            self.group.rebuild(rank)
            with self._one_revival:
                self._bring_back(rank)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _joined(self, call: Call, n: int) -> Generations:
        parts = [call.parts[start] for start in sorted(call.parts)]
        try:
            return Generations.join(parts, n, mixed=self.in_flight)
        except ValueError as error:
            raise InvariantViolation(self.group.name, "generate", str(error), self.group.next_step) from None

"""Engines that share the samples of one call; `Shares` decides who draws which.

- A sample is decided by its prompt, its seed and the weights alone; which engine makes it, with which others,
  in which order or when, changes nothing.
- Engines draw in slices of time, so that they can be given more samples, or asked to give some back, and so
  that weights can change meanwhile. One that is alone, with weights that stay, draws all in a single slice.
- An engine that dies or overruns its deadline is replaced while the others go on (`EngineSet.replace`); what
  it had not finished is queued again. A call returns only when every engine that it lost serves again.
- Several calls may go on at once, from threads of the caller, where weights change meanwhile: an engine then
  advances the samples of all of them together.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.batches.generations import Generations, SamplingSpec
from actors.batches.slices import Asked, Conversation, Parsing, Progress
from actors.cluster.futures import POLL_S, WorkerFuture, first_done
from actors.cluster.patient_clock import patient
from actors.errors import InvariantViolation, NoRoom, RunFailure
from actors.rollout.lengths import Lengths
from actors.rollout.pace import Pace
from actors.rollout.remote import RolloutEngines
from actors.rollout.shares import Shares
from actors.sync.engine_set import EngineSet, Replacement
from actors.sync.engine_state import WeightsState

MAX_RESTARTS = 2
"""Restarts of one engine within one call. A third loss is no accident: something in the call kills it."""

SLICE_S = 0.1
"""Seconds for which an engine generates before it looks at other calls. A call costs 1 to 2 ms, so a slice
loses 2 %; new weights wait for half of one on average, at each of their calls."""

SLICE_SHARE = 0.02
"""Slices grow with the time that a call has taken so far, to this share of it, where no weights wait for
their end: all that does then is an engine that is done before the others."""

WHOLE = "advance"
"""Name of the time that an engine has for the samples that it was given, in however many slices."""


@dataclass(frozen=True)
class Slice:
    """An engine at work, or between two slices of it."""

    answer: WorkerFuture[Progress] | None
    since: float
    """When it was given samples last (`patient()`)."""
    generation: int
    """Of the engine that got them."""


@dataclass
class Call:
    """State of one call of `RolloutPool.generate` or `converse`."""

    key: int
    """Names it in the engines."""
    requests: list[Sequence[int]]
    """Prompt of every sample."""
    sampling: SamplingSpec
    seeds: list[int]
    shares: Shares
    began: float
    conversation: Conversation | None = None
    """Asks for further turns of its samples; None: each is one turn."""
    limits: list[int] = field(default_factory=list)
    """New tokens of each request at most; of a conversation alone."""
    tools: list[Sequence[Mapping[str, Any]] | None] = field(default_factory=list)
    """As `Request.tools`, of each request."""
    drawn_by: dict[int, int] = field(default_factory=dict)
    """Request that has ended -> rank of its engine; of a conversation alone, as is the next."""
    weights: set[tuple[str, int]] = field(default_factory=set)
    """Name and version of the weights that turns were drawn by."""
    slices: dict[int, Slice] = field(default_factory=dict)
    """Of engines that have samples. By rank, as are the next two."""
    replacing: dict[int, Replacement] = field(default_factory=dict)
    """Engines that this call waits for."""
    restarts: Counter[int] = field(default_factory=Counter)
    parts: list[tuple[list[int], Generations]] = field(default_factory=list)
    """Samples that ended, with their numbers."""
    seconds: float = 0.0
    """Of all engines."""

    @property
    def busy(self) -> dict[int, WorkerFuture[Progress]]:
        """Answers that engines owe."""
        return {rank: one.answer for rank, one in self.slices.items() if one.answer is not None}

    @property
    def goes_on(self) -> bool:
        """Some samples have not ended, or may have another turn."""
        return bool(self.shares or self.replacing or (self.conversation and self.conversation.waits()))

    def asked(self, numbers: Sequence[int]) -> Asked:
        asked = Asked(
            numbers, [self.requests[n] for n in numbers], self.sampling, [self.seeds[n] for n in numbers]
        )
        if self.conversation is None:
            return asked
        limits, tools = [self.limits[n] for n in numbers], [self.tools[n] for n in numbers]
        parsing = self.conversation.parsing
        return replace(asked, max_tokens=limits, hand_back=True, parsing=parsing, tools=tools)

    def listen(self, seconds: float) -> None:
        """Take the turns that the conversation asks for by now, or within so many seconds if it has none."""
        assert self.conversation is not None
        new = self.conversation.requests(seconds)
        self.requests += [request.prompt for request in new]
        self.seeds += [request.seed for request in new]
        self.limits += [request.max_tokens for request in new]
        self.tools += [request.tools for request in new]
        near = [None if request.after is None else self.drawn_by[request.after] for request in new]
        self.shares.add([request.key for request in new], near)


class RolloutPool:
    """The engines of a rollout group as one engine."""

    def __init__(self, engines: EngineSet, *, in_flight: bool = False) -> None:
        """`in_flight`: weights can change while samples are in flight."""
        self.engines, self.group, self.in_flight = engines, engines.group, in_flight
        self._remote = RolloutEngines(self.group)
        self._keys = itertools.count()
        self._lengths, self._paces = Lengths(), [Pace() for _ in engines]

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
        size = len(self.engines)
        self._paces = [*self._paces[:size], *(Pace() for _ in range(size - len(self._paces)))]
        hashes = [key for key in (hash(tuple(prompt)) for prompt in prompts) for _ in range(sampling.n)]
        shares = Shares(hashes, sampling.max_tokens, self._lengths, size)
        one_each = sampling.model_copy(update={"n": 1})
        call = Call(next(self._keys), requests, one_each, list(seeds), shares, patient())
        self._draw(call)
        return self._joined(call, sampling.n)

    def converse(self, conversation: Conversation, sampling: SamplingSpec) -> float:
        """Draw turns until a conversation asks for no more; it is told of each. A turn that was lost with its
        engine is drawn again. Returns the engines' seconds.

        Raises: as `generate`.
        """
        shares = Shares([], sampling.max_tokens, self._lengths, self.group.size)
        one_each = sampling.model_copy(update={"n": 1})
        call = Call(next(self._keys), [], one_each, [], shares, patient(), conversation)
        self._draw(call)
        return call.seconds

    def check_parser(self, parsing: Parsing) -> str:
        """As `RolloutEngine.check_parser`, of the first engine with a problem."""
        return next((found for found in self._remote.check_parser(parsing).result() if found), "")

    def _draw(self, call: Call) -> None:
        self._replace_lost(call)
        while call.goes_on:
            if call.conversation is not None:
                # Engines that draw are waited for below; else the environment is.
                call.listen(0.0 if call.slices or call.shares or call.replacing else POLL_S)
            self._hand_out(call)
            self._collect(call)
            self._rejoin(call)

    def expert_load(self) -> list[np.ndarray]:
        """int64 (layers, experts) of each engine that counts: tokens of each expert since the last call.

        Raises:
            RunFailure: an engine is gone.
        """
        asked = [self._remote.expert_load(rank) for rank in self.engines]
        return [load for load in (one.result() for one in asked) if load is not None]

    # --- One turn of a call ---------------------------------------------------------------------

    def _hand_out(self, call: Call) -> None:
        """Let every engine that is between two slices begin the next one."""
        # The generation first: an engine that takes its place meanwhile is another one.
        present = {rank: self.engines[rank].generation for rank in self.engines}
        ready = [rank for rank in present if self.engines.ready(rank, unproved=self.in_flight)]
        busy = call.busy.keys()
        dealt = call.shares.deal(
            [rank for rank in ready if rank not in busy], [rank for rank in ready if rank in busy]
        )
        for rank in self.engines:
            if rank in dealt or (call.shares.held(rank) and rank not in busy):
                begun = call.slices.get(rank) or Slice(None, 0.0, present[rank])
                self._send(call, rank, begun, dealt.get(rank, []), ready)
        if call.shares.queue and not (call.slices or call.replacing):
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

    def _send(self, call: Call, rank: int, last: Slice, numbers: Sequence[int], ready: Sequence[int]) -> None:
        """Begin the next slice of an engine, with samples that it is given or asked for."""
        back = [] if numbers else call.shares.ask_back(rank, ready, self._paces, begun=not self.in_flight)
        # What is asked back is waited for.
        seconds = 0.0 if back else self._slice_seconds(call)
        asked = call.asked(numbers) if numbers else None
        try:
            answer = self.engines.submit(
                rank, last.generation, lambda r: self._remote.advance(r, call.key, seconds, asked, back)
            )
        except RunFailure as failure:  # Another thread has just seen it die.
            self._take_back(call, rank, last.generation, failure)
            return
        since = patient() if numbers else last.since
        call.slices[rank] = replace(last, answer=answer, since=since)

    def _slice_seconds(self, call: Call) -> float | None:
        if self.in_flight or call.conversation is not None:
            return SLICE_S
        elapsed = patient() - call.began
        return None if len(self.engines) == 1 else max(SLICE_S, SLICE_SHARE * elapsed)

    def _collect(self, call: Call) -> None:
        """Wait a moment for answers, take those that are there, and give up on those that are overdue."""
        limit = self.group.limit("generate", WHOLE)
        done = first_done(call.busy, POLL_S)
        for rank in call.busy:
            one = call.slices[rank]
            waited = patient() - one.since
            lost = {} if rank in done else self.group.lost([rank], one.since, "generate")
            if rank in done:
                self._take(call, rank, one)
            elif one.generation != self.engines[rank].generation:
                self._lost(call, rank, RunFailure(self.group.who(rank), "generate", "it was replaced"))
            elif rank in lost:
                self._lost(call, rank, lost[rank])
            elif waited > limit:
                self._lost(call, rank, self.group.overrun(rank, "generate", waited))

    def _take(self, call: Call, rank: int, one: Slice) -> None:
        assert one.answer is not None
        try:
            progress = one.answer.result()
        except RunFailure as failure:
            self._lost(call, rank, failure)
            return
        if progress.made is not None:
            self._keep(call, rank, progress)
        call.seconds += progress.seconds
        lengths = [] if progress.made is None else [len(ids) for ids in progress.made.sequences()]
        waits = call.shares.waits(rank)
        call.shares.returned(rank, progress.returned)
        call.shares.saw(rank, dict(zip(progress.ended, lengths, strict=True)), progress.so_far)
        if not waits:
            self._paces[rank] = self._paces[rank].after(progress.work)
        call.slices[rank] = replace(one, answer=None)
        if not call.shares.held(rank):
            del call.slices[rank]
            if self.group.measured is not None:
                waited = patient() - one.since
                self.group.measured.took(self.group.name, "generate", WHOLE, waited)

    def _keep(self, call: Call, rank: int, progress: Progress) -> None:
        """Samples that ended, for the caller or its conversation."""
        assert progress.made is not None
        if call.conversation is None:
            call.parts.append((progress.ended, progress.made))
            return
        call.drawn_by |= dict.fromkeys(progress.ended, rank)
        call.weights |= {(progress.made.label, int(v)) for v in np.unique(progress.made.token_versions)}
        if len(call.weights) > 1 and not self.in_flight:
            said = f"turns of one model were expected, not of {sorted(call.weights)}"
            raise InvariantViolation(self.group.name, "generate", said, self.group.next_step)
        call.conversation.drew(progress.ended, progress.made, progress.said)

    def _lost(self, call: Call, rank: int, failure: RunFailure) -> None:
        """Queue a lost engine's samples again. One that lives has failed by itself: that ends the call."""
        generation = call.slices[rank].generation
        if self.engines.is_alive(rank, generation):
            raise failure
        self._take_back(call, rank, generation, failure)

    # --- Engines that are replaced --------------------------------------------------------------

    def _take_back(self, call: Call, rank: int, generation: int, failure: RunFailure) -> None:
        call.slices.pop(rank, None)
        call.shares.lost(rank)
        self._replace(call, rank, generation, failure.reason)

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
        if call.replacing and not call.slices:
            wait([replacement.done for replacement in call.replacing.values()], POLL_S, FIRST_COMPLETED)
        for rank, replacement in list(call.replacing.items()):
            if not replacement.done.done():
                continue
            del call.replacing[rank]
            error = replacement.done.exception()
            if error is None:
                continue
            if isinstance(error, NoRoom) or self.engines.is_alive(rank, replacement.generation):
                raise error
            self._replace(call, rank, replacement.generation, self.engines[rank].reason or str(error))

    def _joined(self, call: Call, n: int) -> Generations:
        try:
            made = Generations.join([part for _, part in call.parts], n, mixed=self.in_flight)
        except ValueError as error:
            raise InvariantViolation(self.group.name, "generate", str(error), self.group.next_step) from None
        made = replace(made, seconds=call.seconds)
        numbers = [number for ended, _ in call.parts for number in ended]
        return (
            made
            if numbers == sorted(numbers)
            else made.select(sorted(range(len(numbers)), key=numbers.__getitem__))
        )

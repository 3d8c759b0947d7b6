"""Generation on engines that are formulas: a step takes a time of its own, and a time for each sample."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from actors.batches.slices import Work
from actors.rollout.lengths import Lengths
from actors.rollout.pace import Pace
from actors.rollout.shares import Shares

CALL_S, SLICE_S = 0.0015, 0.1


@dataclass
class Simulated:
    """An engine: seconds of a step, and of each sample in it, with `room` for so many at a time."""

    step: float
    sample: float
    room: int = 256
    so_far: dict[int, int] = field(default_factory=dict)
    """By sample, in the order in which they came."""

    def advance(self, lengths: np.ndarray, until: float) -> tuple[dict[int, int], Work]:
        """Run for so many seconds: the samples that ended with their tokens, and the work."""
        ended: dict[int, int] = {}
        steps, tokens, seconds = 0, 0, 0.0
        while self.so_far and (not steps or seconds < until):
            batch = list(self.so_far)[: self.room]
            each = self.step + self.sample * len(batch)
            # Steps until a sample ends, or the time is over.
            first = min(int(lengths[number]) - self.so_far[number] for number in batch)
            count = max(1, min(first, int(np.ceil(min(until - seconds, 1e6) / each))))
            steps, tokens, seconds = steps + count, tokens + count * len(batch), seconds + count * each
            for number in batch:
                self.so_far[number] += count
                if self.so_far[number] == lengths[number]:
                    ended[number] = self.so_far.pop(number)
        return ended, Work(steps, tokens, seconds)


class SimulatedPool:
    """The pool's turns over simulated engines, without processes; learns from call to call."""

    def __init__(self, engines: list[Simulated]) -> None:
        self.engines, self.lengths = engines, Lengths()
        self.paces = [Pace() for _ in engines]
        self.moved = 0
        """Samples that changed hands so far."""
        self.again = 0
        """Tokens that were drawn in vain for it."""

    def call(self, lengths: np.ndarray, limit: int) -> float:
        """Seconds until samples of these lengths are drawn."""
        shares = Shares(range(len(lengths)), limit, self.lengths, len(self.engines))
        answers: list[tuple[float, int, list[int], dict[int, int], Work]] = []
        now = 0.0
        while shares:
            busy = {rank for _, rank, *_ in answers}
            free = [rank for rank in range(len(self.engines)) if rank not in busy]
            dealt = shares.deal(free, sorted(busy))
            for rank in free:
                if rank in dealt or shares.held(rank):
                    heapq.heappush(answers, self._slice(shares, rank, dealt.get(rank, []), lengths, now))
            now, rank, back, ended, work = heapq.heappop(answers)
            waits = shares.waits(rank)
            shares.returned(rank, back)
            shares.saw(rank, ended, self.engines[rank].so_far)
            if not waits:
                self.paces[rank] = self.paces[rank].after(work)
        return now

    def _slice(
        self, shares: Shares, rank: int, dealt: list[int], lengths: np.ndarray, now: float
    ) -> tuple[float, int, list[int], dict[int, int], Work]:
        everyone = range(len(self.engines))
        back = [] if dealt else shares.ask_back(rank, everyone, self.paces, begun=True)
        engine = self.engines[rank]
        self.moved += len(back)
        self.again += sum(engine.so_far.pop(number) for number in back)
        engine.so_far |= dict.fromkeys(dealt, 0)
        ended, work = engine.advance(lengths, 0.0 if back else max(SLICE_S, 0.02 * now))
        return now + work.seconds + CALL_S, rank, back, ended, work


def drawn_lengths(samples: int, limit: int, median: float, seed: int) -> np.ndarray:
    """Log-normal, cut at the limit: a few samples are many times as long as most."""
    generator = np.random.default_rng(seed)
    return np.clip(generator.lognormal(np.log(median), 0.7, samples), 1, limit).astype(int)


def even_seconds(lengths: np.ndarray, engines: list[Simulated]) -> float:
    """Seconds where every engine begins as many as it has room for, and all end at the same moment."""
    speed = sum(1 / engine.sample for engine in engines)
    steps = max(float(lengths.max()), lengths.sum() / sum(engine.room for engine in engines))
    return float(min(engine.step for engine in engines) * steps + lengths.sum() / speed)


def guided_seconds(lengths: np.ndarray, engines: list[Simulated]) -> float:
    """Seconds where an engine gets half of its share of what is left, at least 16 samples, whenever it has
    drawn the part before: guided self-scheduling (Polychronopoulos & Kuck 1987)."""
    free = [(0.0, rank) for rank in range(len(engines))]
    for part in _guided_parts(len(lengths), len(engines)):
        now, rank = heapq.heappop(free)
        engines[rank].so_far = dict.fromkeys(part, 0)
        _, work = engines[rank].advance(lengths, np.inf)
        heapq.heappush(free, (now + work.seconds, rank))
    return max(now for now, _ in free)


def _guided_parts(samples: int, engines: int) -> Iterator[range]:
    start = 0
    while start < samples:
        size = max(16, -(-(samples - start) // (2 * engines)))
        yield range(start, min(samples, start + size))
        start += size

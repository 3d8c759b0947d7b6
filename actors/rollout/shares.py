"""The samples of one call, shared out among engines; pure.

- All samples are dealt at once, to each engine as many expected tokens as to the others: where a decoding
  step takes as long for one sample as for hundreds, an engine that gets them in parts takes as many times as
  long as there are parts.
- No engine waits while another has samples that it could give away and be ready sooner. A sample that was
  not begun costs nothing to move; one that was is drawn from its first token again. So by the pace of both,
  as many change hands as let the later one of the two end soonest.

Every sample is in exactly one place: queued, kept for an engine, with one engine, or ended.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.rollout.lengths import Lengths
from actors.rollout.pace import Pace

WORTH = 0.1
"""Least share of an engine's remaining time by which it has to end sooner: lengths are guesses."""
WORTH_S = 0.1
"""Least gain in seconds: a few calls have to be made for it."""


@dataclass
class Share:
    """The part of one engine."""

    held: dict[int, int] = field(default_factory=dict)
    """Sample -> tokens so far, 0 while it was not begun. With the engine."""
    kept: list[int] = field(default_factory=list)
    """Samples that another engine has given back for this one."""
    awaits: bool = False
    """Another engine was asked for samples."""
    gives_to: int | None = None
    """The engine for which this one was asked to give some back."""

    waiting: bool = False
    """Some of those that it holds were not begun."""

    @property
    def idle(self) -> bool:
        """It has nothing, and nothing is on its way."""
        return not (self.held or self.kept or self.awaits)

    @property
    def has_room(self) -> bool:
        """It could begin more at once."""
        return not (self.waiting or self.kept or self.awaits or self.gives_to is not None)


class Shares:
    """The parts of all engines in one call."""

    def __init__(self, prompts: Sequence[int], limit: int, lengths: Lengths, engines: int) -> None:
        """`prompts`: hash of every sample's prompt; `limit`: tokens of a sample at most."""
        self.expected = lengths.of(prompts, limit)
        self.queue = list(range(len(prompts)))
        self.shares = [Share() for _ in range(engines)]
        self._prompts, self._limit, self._lengths = prompts, limit, lengths

    def add(self, prompts: Sequence[int], ranks: Sequence[int | None]) -> None:
        """Further samples, numbered on, by hash of their prompts; each is kept for the engine of its rank, if
        it has one."""
        first = len(self._prompts)
        self._prompts = [*self._prompts, *prompts]
        self.expected = np.concatenate([self.expected, self._lengths.of(prompts, self._limit)])
        for number, rank in enumerate(ranks, first):
            (self.queue if rank is None else self.shares[rank].kept).append(number)

    def __bool__(self) -> bool:
        """Some have not ended."""
        return bool(self.queue) or any(share.held or share.kept for share in self.shares)

    def held(self, rank: int) -> bool:
        """True if an engine has samples that have not ended."""
        return bool(self.shares[rank].held)

    def waits(self, rank: int) -> bool:
        """True if an engine has samples that were not begun."""
        return self.shares[rank].waiting

    # --- What happens ---------------------------------------------------------------------------

    def deal(self, free: Collection[int], busy: Collection[int] = ()) -> dict[int, list[int]]:
        """Samples for those of the `free` engines that get some: what was kept for them, and their part of
        the queue. What the `busy` ones are due stays there until they are free.

        Each gets the next samples of the queue, so that those of one prompt stay together (it is computed
        once an engine), and begins with the longest. A single engine keeps the order: it begins all of them
        at once, or loses less by a late long one than a repeated run by another batch.
        """
        parts: dict[int, list[int]] = {}
        for rank, share in enumerate(self.shares):
            if rank in free:
                parts[rank], share.kept = share.kept, []
            elif rank not in busy:  # It serves nobody now.
                self.queue, share.kept = [*share.kept, *self.queue], []
        if self.queue and free:
            self._cut_queue(free, busy, parts)
        for rank, part in parts.items():
            share = self.shares[rank]
            if len(self.shares) > 1:
                part.sort(key=lambda number: -self.expected[number])
            share.held |= dict.fromkeys(part, 0)
            share.waiting = share.waiting or bool(part)
        return {rank: part for rank, part in parts.items() if part}

    def _cut_queue(
        self, free: Collection[int], busy: Collection[int], parts: Mapping[int, list[int]]
    ) -> None:
        """Add to the `parts` of the free engines what makes all engines' loads equal."""
        loads = {rank: float(self._left(self.shares[rank]).sum()) for rank in (*free, *busy)}
        later: list[int] = []
        for rank in [*free, *busy]:
            due = (sum(loads.values()) + self.expected[self.queue].sum()) / len(loads) - loads.pop(rank)
            (later if rank in busy else parts[rank]).extend(self._cut(due if loads else np.inf))
        self.queue = later

    def saw(self, rank: int, ended: Mapping[int, int], so_far: Mapping[int, int]) -> None:
        """Samples ended with so many tokens, and others have so many by now."""
        share = self.shares[rank]
        for number, tokens in ended.items():
            del share.held[number]
            self._lengths.saw(self._prompts[number], tokens)
        share.held.update(so_far)
        share.waiting = not all(share.held.values())

    def returned(self, rank: int, numbers: Sequence[int]) -> None:
        """An engine gave these back, which it was asked for."""
        share = self.shares[rank]
        for number in numbers:
            del share.held[number]
        if share.gives_to is None:
            self.queue += numbers
            return
        receiver, share.gives_to = self.shares[share.gives_to], None
        receiver.kept += numbers
        receiver.awaits = False

    def lost(self, rank: int) -> None:
        """An engine is gone: all that it had is first in the queue."""
        share, self.shares[rank] = self.shares[rank], Share()
        self.queue = [*sorted(share.held), *share.kept, *self.queue]
        if share.gives_to is not None:
            self.shares[share.gives_to].awaits = False
        for donor in self.shares:
            if donor.gives_to == rank:
                donor.gives_to = None

    # --- Who gives to whom ----------------------------------------------------------------------

    def ask_back(
        self, donor: int, ready: Collection[int], paces: Sequence[Pace], *, begun: bool
    ) -> list[int]:
        """Samples that an engine should give back now, for the one of the `ready` that will be done first;
        only the one that will be done last gives.

        `begun`: also samples that were begun, for an engine that has none.
        """
        share, known = self.shares[donor], any(pace.known for pace in paces)
        begun = begun and known
        # Asked at each slice's end: an answer in most cases has to cost nothing.
        if self.queue or share.gives_to is not None or not (share.waiting or begun):
            return []
        others = [rank for rank in ready if rank != donor and self._can_take(rank, share)]
        if not others:
            return []
        lines = _lines(paces)
        times = [
            _seconds(*_extent(self._left(one)), line) for one, line in zip(self.shares, lines, strict=True)
        ]
        receiver = min(others, key=lambda rank: (times[rank], rank))
        if times[donor] < max(times):
            return []
        begun = begun and self.shares[receiver].idle
        numbers, gain, now = self._best(donor, receiver, lines, begun=begun)
        if gain < WORTH * now or (known and gain < WORTH_S):
            return []
        share.gives_to, self.shares[receiver].awaits = receiver, True
        return numbers

    def _can_take(self, rank: int, donor: Share) -> bool:
        return self.shares[rank].has_room if donor.waiting else self.shares[rank].idle

    def _best(
        self, donor: int, receiver: int, lines: Sequence[tuple[float, float]], *, begun: bool
    ) -> tuple[list[int], float, float]:
        """As many of the donor's samples as let the later one of both end soonest, the youngest first and the
        longest of these; seconds by which that is sooner, and until when it would take now."""
        share = self.shares[donor]
        order = sorted(share.held, key=lambda number: (share.held[number], -self.expected[number]))
        so_far = np.array([share.held[number] for number in order], np.float64)
        left, has = self._left(share, order), self._left(self.shares[receiver])
        movable = len(order) if begun else int((so_far == 0).sum())
        # An engine that leaves some waiting works on no more at a time than it does now.
        room = float((so_far > 0).sum() or np.inf) if share.waiting else np.inf
        tokens, longest = _extent(has)
        anew = (left + so_far)[:movable]
        there = _seconds(
            tokens + np.cumsum(anew), np.maximum(np.maximum.accumulate(anew), longest), lines[receiver], room
        )
        rest = np.append(left, 0.0)
        here = _seconds(
            np.cumsum(rest[::-1])[::-1], np.maximum.accumulate(rest[::-1])[::-1], lines[donor], room
        )
        later = np.maximum(there, here[1 : movable + 1])
        if not movable or later.min() >= here[0]:
            return [], 0.0, float(here[0])
        count = int(later.argmin()) + 1
        return order[:count], float(here[0] - later.min()), float(here[0])

    # --- Inside ---------------------------------------------------------------------------------

    def _cut(self, due: float) -> list[int]:
        """The next samples of the queue, as near to `due` expected tokens as whole samples come."""
        ends = np.cumsum(self.expected[self.queue])
        count = int(np.searchsorted(ends - self.expected[self.queue] / 2, due))
        part, self.queue = self.queue[:count], self.queue[count:]
        return part

    def _left(self, share: Share, numbers: Sequence[int] | None = None) -> np.ndarray:
        """float64 (samples,): tokens that are still expected of those of one engine."""
        if numbers is None:
            numbers = [*share.held, *share.kept]
        so_far = np.array([share.held.get(number, 0) for number in numbers], np.float64)
        expected = self.expected[np.array(numbers, np.int64)]
        return self._lengths.given(expected, so_far, self._limit) - so_far


def _extent(left: np.ndarray) -> tuple[float, float]:
    """Tokens of all of these samples, and of the longest."""
    return float(left.sum()), float(left.max(initial=0.0))


def _seconds(tokens: Any, longest: Any, line: tuple[float, float], room: float = np.inf) -> Any:
    """Time for samples with so many tokens, at most `room` of them at a time."""
    step, sample = line
    return step * np.maximum(longest, tokens / room) + sample * tokens


def _lines(paces: Sequence[Pace]) -> list[tuple[float, float]]:
    """Seconds of a step and of a sample in it, by engine; of one that was not measured those of another."""
    known = [pace for pace in paces if pace.known]
    return [(pace if pace.known or not known else known[0]).line() for pace in paces]

"""Snapshots of what ranks hold: results of calls, which Ray keeps for the driver when the ranks are gone.

One of everything (`whole`) before the first step after something was made; then of what steps change, as
often as their cost stays within `SHARE` of the time in between. So a small state is kept after each step, a
large one less often: the steps since are then done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.cluster.liveness import Liveness
from actors.cluster.spec import Phase
from actors.cluster.worker import Asked

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

SHARE = 0.03
"""Of the time between two snapshots, at most, that one takes of a rank's."""
BYTES_PER_SECOND = 1e9
"""Of writing to the object store, by the rank that hands its state over: assumed, not measured."""
CALL_S = 2e-3
"""Of a call, in the driver and in the rank."""


@dataclass(frozen=True)
class Snapshot:
    """A state that ranks hand over."""

    number: int
    """Of the last call before it."""
    facts: Mapping[int, ObjectRef]
    """By rank, as is the next."""
    states: Mapping[int, ObjectRef]

    def of(self, rank: int) -> ObjectRef:
        """State for a rank: its own, or that of the one rank whose replica it is."""
        return self.states[rank] if rank in self.states else next(iter(self.states.values()))


@dataclass(frozen=True)
class Keepers:
    """Ranks that hand their state over, and how they are asked."""

    ranks: Sequence[int]
    actors: Sequence[ActorHandle]
    liveness: Liveness
    snapshot: str
    restore: str
    fetch: bool
    """Have a copy on the driver's node too: ranks are on several nodes, and one of these may go."""

    def take(self, whole: bool, number: int) -> Snapshot:
        """Ask for it; returns at once."""
        facts, states = {}, {}
        asked: Asked = (self.snapshot, "save", self.liveness.limits.save, {})
        for rank in self.ranks:
            call = self.actors[rank].call.options(num_returns=2)
            facts[rank], states[rank] = call.remote(asked, whole)
        return Snapshot(number, facts, states)

    def put(self, states: Callable[[int], list[ObjectRef]]) -> Callable[[], object]:
        """Let every rank take states over; what waits for it."""
        phase: Phase = "restore"
        asked: Asked = (self.restore, phase, self.liveness.limits.restore, {})
        refs = {rank: actor.call.remote(asked, *states(rank)) for rank, actor in enumerate(self.actors)}
        return lambda: self.liveness.finish(refs, phase)


class Snapshots:
    """The snapshots that count, of one built object."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.suffice = True
        """False: the state is too large to be kept, so that nothing can be made again."""
        self._clock = clock
        self._whole: Snapshot | None = None
        self.step: Snapshot | None = None
        """The latest of what steps change; None: none since the whole one."""
        self._coming: Snapshot | None = None
        self._taken, self._cost = 0.0, 0.0

    def take_whole(self, keepers: Keepers, number: int) -> None:
        """Have everything kept, and wait for it; `number`: of the last call before it.

        Raises:
            RunFailure: a rank is gone, or overran `limits.save`.
        """
        self._coming = None
        taken = keepers.take(True, number)
        facts = keepers.liveness.finish(taken.facts, "save")
        # Other ranks may be behind: what was asked before is then answered by all of them.
        keepers.liveness.finish({rank: one.ping.remote() for rank, one in enumerate(keepers.actors)}, "save")
        self.suffice = all(one.kept for one in facts)
        self.step, self._whole = None, taken if self.suffice else None
        self._taken, self._cost = self._clock(), cost(facts)

    def follow(self, keepers: Keepers, number: int, waits: float) -> int | None:
        """After a step was sent, as call `number`: ask for a snapshot behind it where that is due. The number
        of the last call that is in the latest snapshot, where a new one counts from now on. `waits`: of the
        first call whose answer somebody waits for: it may have to be made again, from what was before it."""
        counts = self.settle(keepers, waits, drop=False)
        now = self._clock()
        if self.suffice and self._coming is None and now - self._taken >= self._cost / SHARE:
            self._taken, self._coming = now, keepers.take(False, number)
        return counts

    def settle(self, keepers: Keepers, waits: float, *, drop: bool = True) -> int | None:
        """Take in a snapshot that is there by now, and `drop` one that is not; returns as `follow`."""
        import ray
        from ray.exceptions import RayError

        coming = self._coming
        if coming is None:
            return None
        wanted = [*coming.facts.values(), *coming.states.values()]
        there, _ = ray.wait(wanted, num_returns=len(wanted), timeout=0, fetch_local=keepers.fetch)
        if len(there) < len(wanted) or coming.number >= waits:
            self._coming = None if drop else coming
            return None
        self._coming = None
        try:
            facts = ray.get(list(coming.facts.values()))
        except RayError:  # The rank died over it: the one before it counts.
            return None
        self.suffice = all(one.kept for one in facts)
        if not self.suffice:
            return None
        self.step, self._cost = coming, cost(facts)
        return coming.number

    def restore(self, keepers: Keepers, step: Snapshot | None) -> list[Callable[[], object]]:
        """Let fresh ranks take over everything, and then what steps had changed by `step`; what waits for
        it."""
        kept = [one for one in (self._whole, step) if one is not None]
        return [keepers.put(lambda rank: [one.of(rank) for one in kept])] if kept else []


def cost(facts: Sequence[Any]) -> float:
    """Seconds that a snapshot takes of the slowest rank's time."""
    return max(one.seconds + one.nbytes / BYTES_PER_SECOND for one in facts) + CALL_S

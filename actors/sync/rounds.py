"""Offers of one version, again and again, until all engines that are there have staged it.

After a round that failed the dead are replaced, and the tree over which a version goes is built anew from the
engines that are there: those that died over it, or did not pass it on, get it and pass nothing on. So those
below one that failed get the version by another way. An engine that is missed twice is replaced, though it
lives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from actors.errors import RunFailure
from actors.sync.asking import Participants
from actors.sync.engine_set import EngineSet
from actors.sync.engine_state import WeightsEvent
from actors.sync.phases import Phases, violation
from actors.sync.protocol import Decision, Offer

ROUNDS = 3
"""Of one version, if engines die over it and are replaced in between."""

Attempt = Callable[[Participants, Collection[int]], Decision | None]
"""One round over these engines, of which some pass nothing on."""
Replace = Callable[[], list[int]]
"""Replace engines that are lost; who they were."""


class Rounds:
    """Rounds over the engines of a group."""

    def __init__(self, phases: Phases, engines: EngineSet) -> None:
        self._phases, self._engines = phases, engines
        self._withheld: dict[int, int] = {}
        """Generation of engines that did not pass on what they had."""

    def connect(self, replace: Replace) -> None:
        """Connect all engines. Raises: RunFailure: engines died again and again."""
        self._until_done(self._phases.connect, replace, "they were connected", None)

    def stage(self, offer: Offer, replace: Replace) -> tuple[Participants, list[int], list[int]]:
        """Let all engines stage what is offered: who they are, who of them was replaced, and who did not pass
        on what it had.

        Raises:
            InvariantViolation: an engine refused what it got.
            RunFailure: engines died again and again.
        """
        return self._until_done(
            lambda engines, leaves: self._phases.stage(engines, offer, leaves),
            replace,
            f"they staged version {offer.version}",
            offer,
        )

    def _until_done(
        self, attempt: Attempt, replace: Replace, doing: str, offer: Offer | None
    ) -> tuple[Participants, list[int], list[int]]:
        replaced: list[int] = []
        withheld: list[int] = []
        died: set[int] = set()
        missed: set[int] = set()
        for _ in range(ROUNDS):
            engines = {r: self._engines[r].generation for r in self._engines if self._engines[r].whole}
            decision = attempt(engines, self._leaves() | died)
            if decision is None or decision.commit:
                return engines, replaced, withheld
            if decision.refusals and offer is not None:
                raise violation("rollout", offer.version, "; ".join(decision.refusals), offer)
            relays = dict.fromkeys(relay for relay, _ in decision.not_passed_on)
            self._withheld |= {relay: engines[relay] for relay in relays}
            withheld += relays
            without = {rank for _, rank in decision.not_passed_on}
            dead = {*decision.dead, *(without & missed)}
            missed |= without
            died |= dead
            for rank in sorted(dead):
                self._engines.saw(rank, engines[rank], WeightsEvent.FAILED, f"it died while {doing}")
            replaced += replace()
        group = self._engines.group
        failed = f"engines {replaced} died while {doing}, replaced each time"
        if withheld:
            failed += f"; engines {withheld} did not pass on what they had"
        raise RunFailure("rollout", "sync", failed, group.next_step)

    def _leaves(self) -> set[int]:
        """Engines that pass nothing on."""
        present = {rank: self._engines[rank].generation for rank in self._engines}
        return {rank for rank, generation in self._withheld.items() if present.get(rank) == generation}

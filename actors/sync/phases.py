"""Phases of a weight sync over the engines that take part: load, connect, stage, commit, read back.

Each phase asks all of its engines before it waits for any, and one that fails hides nothing of what the
others did (`asking`). What follows from the answers is decided in `protocol`; what becomes of an engine is
noted in `EngineSet`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.cluster.futures import GroupFuture, WorkerFuture
from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation, RunFailure
from actors.sync import protocol
from actors.sync.asking import Asked, Participants, answers, ask, end_those_that_stand_still
from actors.sync.engine_set import EngineSet
from actors.sync.engine_state import WeightsEvent
from actors.sync.links import Links
from actors.sync.protocol import Decision, Failure, Offer, Readback, SentParts
from actors.sync.relay_tree import TOP, children
from actors.sync.remote import RemoteWeightSource, UpdatableEngines
from actors.sync.spec import Backends, SlotSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Loading:
    """A commit that was begun."""

    version: int
    engines: Participants
    asked: Asked
    later: GroupFuture[SentParts | None] | None
    """Parts that the trainer sends meanwhile."""


class Phases:
    """Calls of a sync to engines and trainer, and what the answers mean for each engine.

    Every call names the generation of its engine, so it never reaches a successor.
    """

    def __init__(
        self,
        policy: WorkerGroup,
        engines: EngineSet,
        base_dir: str,
        backends: Backends,
        fan_out: int,
        keeps: bool,
        slots: SlotSpec | None = None,
    ) -> None:
        """`fan_out`: of `relay_tree`; `keeps`: samples stay in flight over a sync; `slots`: engines keep
        versions as LoRA beside the base."""
        self.source, self.engines = RemoteWeightSource(policy), engines
        self._calls, self._rollout = UpdatableEngines(engines.group), engines.group
        self._links = Links(self.source, engines, backends, fan_out)
        self._base_dir, self._keeps, self._slots = base_dir, keeps, slots
        self.dtype = ""
        """Of the engines; known once one is connected."""

    # --- Connections ----------------------------------------------------------------------------

    def load(self, rank: int, generation: int) -> None:
        """Give an engine that was just made the base.

        Raises:
            RunFailure: it did not load, or was replaced.
            UserError: it can't load this base.
        """
        load = self._calls.load
        self.engines.submit(
            rank, generation, lambda r: load(r, self._base_dir, updatable=True, slots=self._slots)
        ).result()
        failed = self.welcome({rank: generation})
        if failed:
            raise RunFailure(
                self._rollout.who(rank), "sync", failed[rank].reason, self._rollout.next_of(rank)
            )

    def welcome(self, engines: Participants) -> dict[int, Failure]:
        """Ask engines that have loaded the base for what has to be known of them; who failed over it."""
        failed = {}
        for rank, facts in self._links.learn(engines).items():
            if isinstance(facts, Failure):
                failed[rank] = facts
            else:
                self.dtype = facts.dtype
                self.engines.saw(rank, engines[rank], WeightsEvent.LOADED)
        return failed

    def drop(self, engines: Collection[int]) -> None:
        """Close the connections to engines that are gone for good."""
        self._links.drop(engines)

    def connect(self, engines: Participants, leaves: Collection[int] = ()) -> Decision | None:
        """Connect engines as a version would go to them; None if that is done, else what follows.

        `leaves`: pass nothing on.
        """
        wanted = self._links.plan(engines, leaves)
        failed = self._links.make(engines, wanted)
        parents = {rank: link.parent for rank, link in wanted.items()}
        return protocol.decide_links(failed, parents) if failed else None

    # --- Stage and commit -----------------------------------------------------------------------

    def stage(self, engines: Participants, offer: Offer, leaves: Collection[int] = ()) -> Decision:
        """Send to these engines, connected where they are not; where not all staged, those that did forget it
        again. `leaves`: pass nothing on.

        Parts that come inside the commit come from the trainer: there nobody can go back, and one that dies
        would take all with it to whom it passes on.
        """
        wanted = self._links.plan(engines, leaves, direct=offer.parts_later > 0)
        parents = {rank: link.parent for rank, link in wanted.items()}
        failed = self._links.make(engines, wanted)
        if failed:
            return protocol.decide_links(failed, parents)
        below = children(parents, [TOP, *engines])
        asked = self._ask(engines, lambda rank: self._calls.stage(rank, offer.version, below[rank]))
        sending = self.source.send(below[TOP])
        end_those_that_stand_still(self.engines, engines, sending)
        unreached = sending.result()
        answers = self._answers(engines, asked)
        for rank, reason in unreached.items():
            # Whatever it says itself: without a connection it has to be brought up again.
            answers[rank] = Failure(reason, died=True)
        self._links.forget([rank for rank, answer in answers.items() if isinstance(answer, Failure)])
        decision = protocol.decide(offer, answers, parents)
        if decision.commit:
            self._saw(engines, WeightsEvent.ACKNOWLEDGED)
        forgetting = {rank: engines[rank] for rank in decision.discard}
        self._forget(forgetting, offer.version)
        return decision

    def discard(self, engines: Participants, version: int) -> None:
        """Let engines that staged a version forget it: they go on with what they serve."""
        self._forget(engines, version)
        self._saw(engines, WeightsEvent.DISCARDED)

    def _forget(self, engines: Participants, version: int) -> None:
        self._answers(engines, self._ask(engines, lambda rank: self._calls.discard(rank, version)))

    def begin_commit(self, engines: Participants, offer: Offer) -> Loading:
        """Let engines load what they staged, while the trainer sends them what was not staged."""
        asked = self._ask(engines, lambda rank: self._calls.commit(rank, offer.version, self._keeps))
        # Every rank, as for `prepare`.
        later = self.source.send_later([*engines]) if offer.parts_later else None
        return Loading(offer.version, engines, asked, later)

    def end_commit(self, loading: Loading) -> tuple[dict[int, int], SentParts | None]:
        """The engines that did, and what they were sent meanwhile. The others are lost.

        Raises:
            InvariantViolation: not all that was handed over found its place in the engine.
            RunFailure: an engine failed and lives, while samples are in flight.
        """
        version, committed = loading.version, {}
        answers = self._answers(loading.engines, loading.asked)
        sent = None
        if loading.later is not None:
            end_those_that_stand_still(self.engines, loading.engines, loading.later.each()[0])
            sent = loading.later.result()[0]
        for rank, answer in answers.items():
            generation = loading.engines[rank]
            if isinstance(answer, Failure):
                self.engines.saw(rank, generation, WeightsEvent.FAILED, answer.reason)
                if self._keeps and not answer.died:
                    raise RunFailure(
                        self._rollout.who(rank), "sync", answer.reason, self._rollout.next_of(rank)
                    )
                continue
            self.engines.saw(rank, generation, WeightsEvent.COMMITTED)
            wrong = protocol.mismatch_in_commit(version, answer)
            if wrong is None and sent is not None:
                wrong = protocol.mismatch_in_parts(sent, answer)
            if wrong is not None:
                raise self.lose(rank, generation, version, wrong)
            committed[rank] = generation
        return committed, sent

    # --- Proof ----------------------------------------------------------------------------------

    def read(
        self,
        engines: Participants,
        version: int,
        known: str,
        scoring: Asked,
    ) -> dict[int, tuple[Readback, list[np.ndarray]] | str]:
        """Digests of what engines hold of a version, and the probes' log-probabilities by it; or why one that
        lives can't say. By rank; one that died over it is lost and left out. `known`: digest of all digests
        that they should have; `scoring`: of `begin_scoring`."""
        reading = self._ask(engines, lambda rank: self._calls.readback(rank, version, known))
        read, scored = self._answers(engines, reading), self._answers(engines, scoring)
        found: dict[int, tuple[Readback, list[np.ndarray]] | str] = {}
        for rank, generation in engines.items():
            failure = next((a for a in (read[rank], scored[rank]) if isinstance(a, Failure)), None)
            if failure is None:
                found[rank] = read[rank], scored[rank]
            elif failure.died:
                self.engines.saw(rank, generation, WeightsEvent.FAILED, failure.reason)
            else:
                found[rank] = failure.reason
        return found

    def begin_scoring(
        self,
        engines: Participants,
        probes: Sequence[Sequence[int]],
        starts: Sequence[int],
        version: int | None = None,
    ) -> Asked:
        """Ask for log-probabilities of tokens of each probe, from `starts` on, by a version (None: what is
        served)."""
        return self._ask(engines, lambda rank: self._calls.score_tokens(rank, probes, starts, version))

    def wait(self, engines: Participants, asked: Asked) -> None:
        """Wait for answers, whatever they are."""
        self._answers(engines, asked)

    # --- Faults ---------------------------------------------------------------------------------

    def lose(
        self, rank: int, generation: int, version: int, reason: str, offer: Offer | None = None
    ) -> InvariantViolation:
        """An engine that is not what it should be serves nobody any more; the error to raise."""
        self.engines.saw(rank, generation, WeightsEvent.FAILED, reason)
        return violation(self._rollout.who(rank), version, reason, offer)

    def _saw(self, engines: Participants, event: WeightsEvent, reason: str = "") -> None:
        for rank, generation in engines.items():
            self.engines.saw(rank, generation, event, reason)

    def _ask(self, engines: Participants, call: Callable[[int], WorkerFuture[Any]]) -> Asked:
        return ask(self.engines, engines, call)

    def _answers(self, engines: Participants, asked: Asked) -> dict[int, Any]:
        return answers(self.engines, engines, asked)


def violation(who: str, version: int, reason: str, offer: Offer | None = None) -> InvariantViolation:
    """The error of a version that can't be trusted, with the facts."""
    digest = f" ({offer.tensors} tensors, {offer.bytes} bytes, digest {offer.digest})" if offer else ""
    return InvariantViolation(
        who,
        "sync",
        f"version {version}{digest}: {reason}",
        "generations of these weights can't be trusted: keep the logs, and report the architecture",
    )

"""The phases of a weight sync, each over several engines at once: stage, then commit."""

from __future__ import annotations

from dataclasses import dataclass

from actors.cluster.futures import Pending, PendingOne
from actors.cluster.worker_group import ActorGroup
from actors.errors import RunFailure
from actors.sync import protocol
from actors.sync.engines import Engines
from actors.sync.protocol import Event, Failure, Offer, Sent, State
from actors.sync.spec import Backend


@dataclass(frozen=True)
class Loading:
    """A commit that was begun."""

    version: int
    asked: dict[int, PendingOne | Failure]
    later: Pending | None
    """What the trainer sends meanwhile."""


class Phases(Engines):
    """What is asked of engines in a sync, and what follows from their answers."""

    def __init__(
        self, policy: ActorGroup, rollout: ActorGroup, base_dir: str, backend: Backend, keeps: bool
    ) -> None:
        """`keeps`: samples stay in flight over a sync."""
        super().__init__(policy, rollout, base_dir, backend)
        self._keeps = keeps

    def _stage(self, ranks: list[int], offer: Offer) -> protocol.Decision:
        """Send to these engines; where not all staged, those that did forget it again."""
        asked = {rank: self._ask(rank, "stage", offer.version) for rank in ranks}
        unreached = self.policy.call_rank(0, "weight_source.send", ranks, phase="sync")
        answers = self._answers(asked)
        for rank, reason in unreached.items():
            # Whatever it says itself: without a connection it has to be brought up again.
            answers[rank] = Failure(reason, died=True)
        decision = protocol.decide(offer, answers)
        for rank in ranks:
            if decision.commit:
                self._mark(rank, Event.ACKNOWLEDGED)
        self._answers({rank: self._ask(rank, "discard", offer.version) for rank in decision.discard})
        return decision

    def _begin_commit(self, ranks: list[int], offer: Offer) -> Loading:
        """Let engines load what they staged, while the trainer sends them what was not staged."""
        how = (offer.version, True) if self._keeps else (offer.version,)
        asked = {rank: self._ask(rank, "commit", *how) for rank in ranks}
        later = None
        if offer.parts_later:
            # Every rank, as for `prepare`.
            later = self.policy.submit("weight_source.send_later", ranks, phase="sync")
        return Loading(offer.version, asked, later)

    def _end_commit(self, loading: Loading) -> tuple[list[int], Sent | None]:
        """The engines that did, and what they were sent meanwhile. The others are lost.

        Raises:
            InvariantViolation: not all that was handed over found its place in the engine.
        """
        version = loading.version
        answers = self._answers(loading.asked)
        sent: Sent | None = None if loading.later is None else loading.later.result()[0]
        for rank, answer in answers.items():
            if isinstance(answer, Failure):
                self._mark(rank, Event.FAILED, answer.reason)
                if self._keeps and not answer.died:
                    raise RunFailure(
                        self.rollout.who(rank), "sync", answer.reason, self.rollout.next_of(rank)
                    )
                continue
            self._mark(rank, Event.COMMITTED)
            wrong = protocol.objection_to_commit(version, answer)
            if wrong is None and sent is not None:
                wrong = protocol.objection_to_parts(sent, answer)
            if wrong is not None:
                raise self._lose(rank, version, wrong)
        return [rank for rank in answers if self.engines[rank].state is State.COMMITTED], sent

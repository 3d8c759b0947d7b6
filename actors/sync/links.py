"""Connections over which a version goes to the engines that take part, as the driver sees them.

Each engine has one, to the trainer or to an engine that passes on (`relay_tree`). They are made all at once
where there are none, and made anew where the tree has changed: after an engine was replaced, or where one
fails to pass on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from actors.sync.asking import Participants, answers, as_answered, ask
from actors.sync.engine_set import EngineSet
from actors.sync.protocol import EngineFacts, Failure
from actors.sync.relay_tree import TOP, levels, relay_tree
from actors.sync.remote import RemoteWeightSource, UpdatableEngines
from actors.sync.spec import Backend, Backends

CHANNEL_SHARE = 0.8
"""Of `limits.sync`: deadline inside of channels, so that who waits in vain for a peer says so itself."""


@dataclass(frozen=True)
class Link:
    """Connection of an engine to whoever sends to it."""

    generation: int
    parent: int
    """`TOP`, or an engine."""
    parent_generation: int
    level: int
    """Number of times that what comes this way was sent; with parts that follow, one more."""
    hop_s: float
    """Deadline of each time."""

    @property
    def receives_s(self) -> float:
        """Deadline of the receiving end: those above may use up theirs, and whoever sends part after part may
        have waited for another engine that hangs."""
        return self.level * self.hop_s


class Links:
    """The connections of the engines of a group."""

    def __init__(
        self, source: RemoteWeightSource, engines: EngineSet, backends: Backends, fan_out: int
    ) -> None:
        self._source, self._engines, self._backends, self._fan_out = source, engines, backends, fan_out
        self._calls = UpdatableEngines(engines.group)
        self._facts: dict[int, tuple[int, EngineFacts]] = {}
        self._made: dict[int, Link] = {}

    def learn(self, engines: Participants) -> dict[int, EngineFacts | Failure]:
        """Ask engines that have loaded the base where they are and what they compute in."""
        found = answers(self._engines, engines, ask(self._engines, engines, self._calls.describe))
        for rank, facts in found.items():
            if isinstance(facts, EngineFacts):
                self._facts[rank] = engines[rank], facts
        return found

    def plan(
        self, engines: Participants, leaves: Collection[int] = (), direct: bool = False
    ) -> dict[int, Link]:
        """The connection of each engine; `leaves`: pass nothing on; `direct`: nobody does, as parts
        follow."""
        nodes = {rank: self._facts[rank][1].address for rank in engines}
        parents = dict.fromkeys(engines, TOP) if direct else relay_tree(nodes, self._fan_out, leaves)
        level = {rank: level + direct for rank, level in levels(parents).items()}
        top = self._source.group.lives
        hop_s = CHANNEL_SHARE * self._engines.group.limits.of("sync") / max(level.values(), default=1)
        return {
            rank: Link(generation, parents[rank], engines.get(parents[rank], top), level[rank], hop_s)
            for rank, generation in engines.items()
        }

    def make(self, engines: Participants, wanted: Mapping[int, Link]) -> dict[int, Failure]:
        """Make the connections that are not there, all at the same time; why some could not be made."""
        lacking = {rank: link for rank, link in wanted.items() if self._made.get(rank) != link}
        if not lacking:
            return {}
        addresses, failed = self._listen(engines, lacking)
        reaching = {rank: engines[rank] for rank in addresses}
        calls = ask(
            self._engines,
            reaching,
            lambda rank: self._calls.connect(rank, addresses[rank], lacking[rank].receives_s),
        )
        opening: dict[int, Any] = {}
        accepting: list[_Accepting] = []
        # Whoever sends waits only for engines that have reached its port: others keep nobody waiting.
        for some in as_answered(self._engines, reaching, calls):
            failed |= {rank: answer for rank, answer in some.items() if isinstance(answer, Failure)}
            there = {rank: engines[rank] for rank in some if rank not in failed}
            opening |= ask(
                self._engines,
                there,
                lambda rank: self._calls.open_channel(rank, self._backends.of(rank, lacking[rank].parent)),
            )
            accepting += self._accept(engines, there, lacking)
        opened = answers(self._engines, {rank: engines[rank] for rank in opening}, opening)
        # One that died says more than whoever waited for it.
        failed |= self._not_accepted(engines, accepting)
        failed |= {rank: answer for rank, answer in opened.items() if isinstance(answer, Failure)}
        self._made |= {rank: link for rank, link in lacking.items() if rank not in failed}
        self.forget(failed)
        return failed

    def forget(self, engines: Collection[int]) -> None:
        """The connections of these engines failed: they have to be made anew."""
        for rank in engines:
            self._made.pop(rank, None)

    def drop(self, engines: Collection[int]) -> None:
        """Forget engines that are gone for good, on the trainer's side too."""
        for rank in engines:
            self._source.disconnect(rank).result()
            self._facts.pop(rank, None)
        self.forget(engines)

    def _listen(
        self, engines: Participants, lacking: Mapping[int, Link]
    ) -> tuple[dict[int, str], dict[int, Failure]]:
        """Addresses of those that are waited for; the failures of others."""
        below = _by_parent(lacking, lacking)
        hop_s = next(iter(lacking.values())).hop_s
        relays = {parent: engines[parent] for parent in below if parent != TOP}
        calls = ask(self._engines, relays, lambda rank: self._calls.listen(rank, below[rank], hop_s))
        addresses = self._source.listen(below[TOP], hop_s).result() if TOP in below else {}
        failed: dict[int, Failure] = {}
        for parent, answer in answers(self._engines, relays, calls).items():
            if isinstance(answer, Failure):
                failed |= {parent: answer, **_no_way(dict.fromkeys(below[parent], answer.reason))}
            else:
                addresses |= answer
        return {rank: address for rank, address in addresses.items() if rank not in failed}, failed

    def _accept(
        self, engines: Participants, there: Participants, lacking: Mapping[int, Link]
    ) -> list[_Accepting]:
        """Let whoever sends to these engines, which have reached it, accept them."""
        asked = []
        for (parent, backend), below in self._alike(there, lacking).items():
            if parent == TOP:
                asked.append(_Accepting(parent, below, self._source.accept(below, backend)))
                continue
            accept = partial(self._calls.accept, engines=below, backend=backend)
            call = ask(self._engines, {parent: engines[parent]}, accept)[parent]
            asked.append(_Accepting(parent, below, call))
        return asked

    def _alike(
        self, engines: Iterable[int], links: Mapping[int, Link]
    ) -> dict[tuple[int, Backend], list[int]]:
        """Engines of which whoever sends can accept some together."""
        found: dict[tuple[int, Backend], list[int]] = defaultdict(list)
        for rank in engines:
            parent = links[rank].parent
            found[parent, self._backends.of(rank, parent)].append(rank)
        return found

    def _not_accepted(self, engines: Participants, accepting: Sequence[_Accepting]) -> dict[int, Failure]:
        """Reasons of engines that were not accepted. Raises: RunFailure: the trainer failed."""
        failed: dict[int, Failure] = {}
        for one in accepting:
            if one.parent == TOP:
                failed |= _no_way(one.call.result())
                continue
            relay = {one.parent: engines[one.parent]}
            answer = answers(self._engines, relay, {one.parent: one.call})[one.parent]
            if isinstance(answer, Failure):
                failed |= {one.parent: answer, **_no_way(dict.fromkeys(one.engines, answer.reason))}
            else:
                failed |= _no_way(answer)
        return failed


@dataclass(frozen=True)
class _Accepting:
    """A call of whoever sends, to accept engines that have reached it."""

    parent: int
    engines: list[int]
    call: Any
    """A `WorkerFuture`, or a `Failure` of a relay."""


def _by_parent(engines: Iterable[int], links: Mapping[int, Link]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for rank in engines:
        found[links[rank].parent].append(rank)
    return found


def _no_way(reasons: Mapping[int, str]) -> dict[int, Failure]:
    """Failures of engines that live, for all that is known, and could not be reached."""
    return {rank: Failure(reason, died=False, link=True) for rank, reason in reasons.items()}

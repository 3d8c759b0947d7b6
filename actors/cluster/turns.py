"""Turns of trainer and engines on one device: one of them is awake, never both.

Whoever sleeps has given its memory back: an engine by vLLM's sleep (weights to the host, the cache dropped),
the trainer by parking what the plan says (`turn_plan`). A turn begins when all of the other side have said
that they sleep. A process that does not say so, though it lives, ends the run; one that is gone holds
nothing, and one that does not answer is ended.

Without weights on the device a parked trainer still listens, and sends the version that it has packed: so an
engine that is lost in the engines' turn is replaced and brought up to date in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from actors.cluster.futures import GroupFuture, WorkerFuture
from actors.cluster.health import ProcessState
from actors.cluster.lasting_group import RanksReplaced
from actors.cluster.turn_plan import (
    Device,
    EngineBytes,
    Moves,
    Offload,
    TrainerBytes,
    both_awake,
    plan_turns,
)
from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure

T = TypeVar("T")


@dataclass(frozen=True)
class SleepingRanks:
    """Ranks of a policy that give their device up to engines, and take it back; each call of `Residence`."""

    group: WorkerGroup

    def bytes(self) -> GroupFuture[TrainerBytes]:
        return self.group.submit("residence.bytes", phase="sync")

    def park(self, moves: Moves) -> GroupFuture[bool]:
        return self.group.submit("residence.park", moves, phase="sync")

    def wake(self) -> GroupFuture[bool]:
        return self.group.submit("residence.wake", phase="sync")


@dataclass(frozen=True)
class SleepingEngines:
    """Engines that give their device up to a policy, and take it back; each call of `RolloutEngine`."""

    group: WorkerGroup

    def sleep(self, rank: int) -> WorkerFuture[bool]:
        return self.group.submit_rank(rank, "sleep", phase="sync")

    def wake_up(self, rank: int) -> WorkerFuture[bool]:
        return self.group.submit_rank(rank, "wake_up", phase="sync")


class Turns:
    """Turns of policy and engines, here of those that have devices of their own: nobody waits for anybody."""

    alternate = False
    """Policy and engines share a device."""

    def to_policy(self) -> None:
        """Return when the policy has its device."""

    def to_engines(self) -> None:
        """Return when the engines have their device."""

    def policy_built(self) -> None:
        """Note that the policy has loaded a base: it is awake, and what moves has to be planned anew."""

    def gone(self) -> None:
        """Note that no process of either side is left."""


class OneDevice(Turns):
    """Turns of a policy and engines that sit on the same devices, over all stages of a run."""

    alternate = True

    def __init__(
        self,
        policy: Callable[[], WorkerGroup | None],
        engines: Callable[[], WorkerGroup | None],
        offload: Offload,
        engine_bytes: Callable[[TrainerBytes], EngineBytes],
        note: Callable[[str], None],
    ) -> None:
        """`policy`: its workers, once their base is loaded, or None without any; `engines`: their processes,
        each with an engine, loaded or not; `engine_bytes`: of the engine beside a rank with these; `note`:
        says a line."""
        self._policy, self._engines = policy, engines
        self._offload, self._engine_bytes, self._note = offload, engine_bytes, note
        self._device, self._moves = Device(), None

    _moves: Moves | None
    """Of the policy as it was built last; None: not planned yet."""

    def policy_built(self) -> None:
        """As `Turns.policy_built`."""
        self._device, self._moves = self._device.with_(policy=True), None

    def gone(self) -> None:
        """As `Turns.gone`."""
        self._device, self._moves = Device(), None

    def to_policy(self) -> None:
        """As `Turns.to_policy`.

        Raises:
            InvariantViolation: an engine that lives does not sleep.
            RunFailure: a rank of the policy failed.
        """
        if self._device.engines:
            self._put_engines_to_sleep()
            self._device = self._device.with_(engines=False)
        group = None if self._device.policy else self._policy()
        if group is not None:
            self._device = self._device.with_(policy=True)
            _answer(SleepingRanks(group).wake)

    def to_engines(self) -> None:
        """As `Turns.to_engines`. Engines that are found dead stay so: who uses them next replaces them.

        Raises:
            UserError: they don't fit on the device beside what stays of the policy.
            InvariantViolation: a rank of the policy does not sleep.
            RunFailure: a rank of the policy, or an engine that lives, failed.
        """
        if self._device.engines:
            return
        group = self._policy() if self._device.policy else None
        if group is not None:
            if self._moves is None:
                self._moves = self._planned(group)
            ranks, moves = SleepingRanks(group), self._moves
            awake: list[bool] = _answer(lambda: ranks.park(moves))
            self._refuse_awake(group, awake)
        self._device = self._device.with_(policy=False, engines=True)
        engines = self._engines()
        if engines is not None:
            self._asked(engines, SleepingEngines(engines).wake_up)

    def _planned(self, group: WorkerGroup) -> Moves:
        fullest = _fullest(_answer(SleepingRanks(group).bytes))
        plan = plan_turns(self._offload, fullest, self._engine_bytes(fullest))
        self._note(str(plan))
        return plan.moves

    def _put_engines_to_sleep(self) -> None:
        engines = self._engines()
        if engines is None:
            return
        answers = self._asked(engines, SleepingEngines(engines).sleep)
        self._refuse_awake(engines, answers)
        for rank, answer in enumerate(answers):
            if answer is None and engines.fleet.members[rank].state is ProcessState.SUSPECT:
                # It may hold the device's memory for as long as it lives.
                engines.restart(rank)
                engines.rebuild(rank)

    def _asked(self, engines: WorkerGroup, call: Callable[[int], WorkerFuture[bool]]) -> list[bool | None]:
        """What each engine says, asked all at once; None of one whose process is gone or does not answer."""
        asked: list[WorkerFuture[bool] | None] = []
        for rank in range(engines.size):
            asked.append(call(rank) if engines.fleet.serves(rank) else None)
        answers: list[bool | None] = []
        for rank, one in enumerate(asked):
            try:
                answers.append(None if one is None else one.result())
            except RunFailure:
                if engines.fleet.serves(rank):
                    raise
                answers.append(None)
        return answers

    def _refuse_awake(self, group: WorkerGroup, awake: Sequence[bool | None]) -> None:
        for rank, one in enumerate(awake):
            if one:
                raise both_awake(group.who(rank), "it was told to sleep and is awake")


def _answer(call: Callable[[], GroupFuture[T]]) -> list[T]:
    """Each rank's answer; asked again where others took the place of ranks, which are awake then."""
    while True:
        with contextlib.suppress(RanksReplaced):
            return call().result()


def _fullest(ranks: Sequence[TrainerBytes]) -> TrainerBytes:
    """The rank with most on its device."""
    return max(ranks, key=lambda one: one.base + one.optimizer + one.activations)

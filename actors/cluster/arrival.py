"""Processes on their way: asked for, and again where the node has died on which Ray would have started them.

What is seen of one process and its bundle of resources, and what follows (`decide`, pure):

    the bundle is on           the process             what follows
    no living node             any                     wait for room, `limits.room` in all; then the run ends
    another node than when     any                     ask for it again, there; `limits.start` begins anew
    the process was asked for
    the same node              answers                 it is up
                               is gone                 it died
                               has not answered yet    wait, `limits.start`; then it is overdue
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from actors.cluster import futures as waiting
from actors.cluster.health import ProcessEvent
from actors.cluster.patient_clock import patient
from actors.cluster.placement import Places
from actors.cluster.spec import LimitsSpec
from actors.errors import AGAIN, NoRoom

if TYPE_CHECKING:
    from ray import ObjectRef

    from actors.cluster.liveness import Liveness

LOOK_S = 1.0
"""Pause between two questions to Ray where bundles are, of 2 ms."""
SAY_S = 3.0
"""A bundle that has been without a node for longer is told of: where there is room, Ray finds it sooner."""


class Next(StrEnum):
    """Consequence of what was seen of a process."""

    WAIT = "wait"
    ASK_AGAIN = "ask again"
    OVERDUE = "overdue"
    NO_ROOM = "no room"


def decide(
    asked_on: str | None, now_on: str | None, since_asked: float, homeless: float, limits: LimitsSpec
) -> Next:
    """Next step for a process that has not answered.

    Args:
        asked_on, now_on: node of its bundle when it was asked for, and now; None: no living one.
        since_asked, homeless: seconds since then, and since its bundle was last on a living node.
    """
    if now_on is None:
        return Next.NO_ROOM if homeless >= limits.room else Next.WAIT
    if now_on != asked_on:
        return Next.ASK_AGAIN
    return Next.OVERDUE if since_asked >= limits.start else Next.WAIT


@dataclass
class _Arriving:
    """A process that was asked for."""

    ping: ObjectRef | None
    """Its first answer; None while there is nobody to ask."""
    asked_on: str | None
    asked: float
    homed: float
    """When its bundle was last seen on a living node."""
    told: bool = False


class Arrivals:
    """A wait for processes of one group that were restarted."""

    def __init__(
        self,
        liveness: Liveness,
        places: Places,
        ping: Callable[[int], ObjectRef],
        start: Callable[[int], str | None],
        note: Callable[[str], None],
    ) -> None:
        """`ping`: the first answer of the present process of a rank; `start`: ask for a new one in its place,
        on which node, None where there is no room; `note`: says a line."""
        self._liveness, self._places, self._note = liveness, places, note
        self._ping, self._start = ping, start

    def wait(self, asked_on: Mapping[int, str | None]) -> None:
        """Return when all are up. `asked_on`: node on which each process was asked for; None: on none.

        Raises:
            NoRoom: a node died, and what was on it has no room within `limits.room`.
            RunFailure: one died, or was not up within `limits.start`.
        """
        now = patient()
        arriving = {
            rank: _Arriving(None if on is None else self._ping(rank), on, now, now)
            for rank, on in asked_on.items()
        }
        looked = patient()
        while arriving:
            there = self._answered({rank: one.ping for rank, one in arriving.items() if one.ping is not None})
            if patient() - looked < LOOK_S and not there:
                continue
            looked = patient()
            for rank in list(arriving):
                if self._up(rank, arriving[rank], rank in there):
                    del arriving[rank]

    def _answered(self, pings: dict[int, ObjectRef]) -> list[int]:
        """Those with an answer, or whose process is gone; waits a moment. Raises: RunFailure: Ray is lost."""
        waiting.refuse_lost_ray()
        if not pings:
            time.sleep(waiting.POLL_S)
            return []
        import ray

        done, _ = ray.wait(list(pings.values()), num_returns=1, timeout=waiting.POLL_S)
        return [rank for rank, ping in pings.items() if ping in done]

    def _up(self, rank: int, one: _Arriving, answered: bool) -> bool:
        """Do what follows; True once it is up."""
        now_on, now = self._places.node_of(rank), patient()
        if answered:
            ping, one.ping = one.ping, None
            if now_on == one.asked_on and ping is not None:
                self._liveness.finish({rank: ping}, "start")
                return True
        if now_on is not None:
            one.homed = now
        limits = self._liveness.limits
        step = decide(one.asked_on, now_on, now - one.asked, now - one.homed, limits)
        if step is Next.NO_ROOM:
            raise self._no_room(rank)
        if step is Next.OVERDUE:
            raise self._liveness.overdue([rank], "start", now - one.asked)
        if step is Next.ASK_AGAIN:
            one.asked_on, one.asked = self._start(rank), now
            one.ping = None if one.asked_on is None else self._ping(rank)
            self._note(f"{self._liveness.who(rank)}: its node has died; it starts on another one")
        elif now - one.homed > SAY_S and not one.told:
            one.told = True
            self._note(
                f"{self._liveness.who(rank)}: its node has died, and no other has room; waiting for it for "
                f"{limits.room:.0f} s at most (limits.room): {self._places.missing()}"
            )
        return False

    def _no_room(self, rank: int) -> NoRoom:
        limit = self._liveness.limits.room
        reason = (
            f"its node has died, and no other had room within {limit:.0f} s (limits.room): "
            f"{self._places.missing()}"
        )
        self._liveness.saw([rank], ProcessEvent.DIED, reason)
        return NoRoom(self._liveness.who(rank), "start", reason, AGAIN)

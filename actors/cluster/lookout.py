"""Looks after the processes of a group while somebody waits for them: which of them stand still, and for
which of them the others wait.

Nothing is done in a wait that is short. On the driver's machine the driver looks itself; on another node a
task of Ray's does, which needs no CPU and is gone when it has answered.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.cluster.hung import STILL_S, Look, Seen, hung
from actors.cluster.patient_clock import patient
from actors.cluster.process_looks import Targets, look_at
from actors.cluster.pulse import machine

if TYPE_CHECKING:
    from ray import ObjectRef

LOOK_S = 5.0
"""Pause between two looks, and before the first one of a wait. A look at a process takes 1 ms of CPU time."""
AWAY_S = 10.0
"""The same for processes of other nodes, where Ray may have to start a process for the task, in about 1 s."""


@dataclass(frozen=True)
class Whereabouts:
    """Place of a process, as it says itself."""

    pid: int
    machine: str
    node: str
    """Ray's id of it."""
    note: str
    """Path of its pulse's file."""


class Lookout:
    """Looks at the processes of one group, and what they have shown. For use by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: dict[int, ObjectRef] = {}
        """First answers that have not come."""
        self._since: dict[int, float] = {}
        """When these processes were asked for."""
        self._places: dict[int, Whereabouts] = {}
        self._seen: dict[int, Seen] = {}
        self._looked = {True: -AWAY_S, False: -AWAY_S}
        """Time of the last looks, here and elsewhere."""
        self._asked: list[ObjectRef] = []
        self._here = machine()

    def expect(self, rank: int, ping: ObjectRef) -> None:
        """A process was started in the place of `rank`, and will say where it is."""
        with self._lock:
            self._expected[rank], self._since[rank] = ping, patient()
            self._places.pop(rank, None)
            self._seen.pop(rank, None)

    def lost(self, ranks: Collection[int], waited_s: float) -> dict[int, str]:
        """Of ranks that somebody has waited for so long, those that stand still, with the reason."""
        if waited_s < LOOK_S:
            return {}
        with self._lock:
            self._look(waited_s)
            found = {rank: self._seen[rank].lost() for rank in ranks if rank in self._seen}
        return {rank: reason for rank, reason in found.items() if reason is not None}

    def silent(self, ranks: Collection[int], limit_s: float) -> list[int]:
        """Of these ranks, those that were asked for `limit_s` ago and have not come up."""
        with self._lock:
            if self._expected:
                self._find()
            return [r for r in ranks if r in self._expected and patient() - self._since[r] >= limit_s]

    def excuse(self, ranks: Collection[int]) -> None:
        """Let these ranks have as long again to come up."""
        with self._lock:
            self._since.update(dict.fromkeys(ranks, patient()))

    def hung(self, late: Collection[int], limit_s: float) -> dict[int, str]:
        """Of ranks that have overrun a deadline of `limit_s`, those for which the others wait: see
        `hung.hung`. A short deadline gives few looks: one more may be waited for."""
        still_s = min(STILL_S, limit_s / 2)
        with self._lock:
            self._look(AWAY_S, now=True)
            found = hung(self._seen, late, still_s)
            seen = [self._seen[rank] for rank in late if rank in self._seen]
        known_s = min([one.at - one.since for one in seen], default=still_s)
        if found or len(late) == 1 or known_s >= still_s:
            return found
        time.sleep(still_s - known_s)
        with self._lock:
            self._look(AWAY_S, now=True)
            return hung(self._seen, late, still_s)

    # --- Inside -------------------------------------------------------------------------------------

    def _look(self, waited_s: float, now: bool = False) -> None:
        """Take the looks that are due, and those that have come from other nodes."""
        self._find()
        at = patient()
        here = {rank: place for rank, place in self._places.items() if place.machine == self._here}
        if here and (now or at - self._looked[True] >= LOOK_S):
            self._looked[True] = at
            self._take(look_at(targets(here)), at)
        away = {rank: place for rank, place in self._places.items() if rank not in here}
        if away and waited_s >= AWAY_S:
            self._look_away(away, at)

    def _look_away(self, away: dict[int, Whereabouts], at: float) -> None:
        import ray

        done, self._asked = ray.wait(self._asked, num_returns=len(self._asked), timeout=0)
        for ref in done:
            self._take(_answer(ref) or {}, at)
        if self._asked or at - self._looked[False] < AWAY_S:
            return
        self._looked[False] = at
        by_node: dict[str, dict[int, Whereabouts]] = defaultdict(dict)
        for rank, place in away.items():
            by_node[place.node][rank] = place
        self._asked = [_ask(node, targets(places)) for node, places in by_node.items()]

    def _find(self) -> None:
        """Take the answers of processes that are up."""
        import ray

        for rank, ref in list(self._expected.items()):
            if ray.wait([ref], timeout=0)[0]:
                del self._expected[rank]
                said = _answer(ref)
                if said is not None:
                    self._places[rank] = Whereabouts(said["pid"], said["machine"], said["node"], said["note"])

    def _take(self, looks: dict[int, Look], at: float) -> None:
        for rank, look in looks.items():
            if rank in self._places:
                before = self._seen.get(rank)
                self._seen[rank] = Seen.first(look, at) if before is None else before.after(look, at)


def targets(places: dict[int, Whereabouts]) -> Targets:
    """Those of `look_at`."""
    return {rank: (place.pid, place.note) for rank, place in places.items()}


def _ask(node: str, of: Targets) -> ObjectRef:
    """Have a node's processes looked at, on that node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(look_at).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(of)


def _answer(ref: ObjectRef) -> Any:
    """The value of a call that is back; None: its process, or the node, is gone."""
    import ray

    try:
        return ray.get(ref)
    except Exception:  # the group's own calls say what it is
        return None

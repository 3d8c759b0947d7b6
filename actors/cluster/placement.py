"""Places of a group's processes on the nodes of a cluster: a bundle of resources for each, kept by Ray.

When a node dies, Ray places its bundles anew, on nodes that have room or get it later. It does so as soon as
it knows: within a second where the raylet's connection breaks, after about half a minute where a machine
falls silent. A process that is asked for meanwhile, in a bundle that still seems to be on the dead node,
would never come: `arrival` looks after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from actors.cluster.room import listed
from actors.cluster.spec import RoleSpec, bundle
from actors.errors import NoRoom

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

GUEST_SHARE = 0.5
"""Of a GPU, in Ray's count, for a process that takes turns with the one whose bundle it is in. Ray puts two
processes on one GPU only where each asks for a part of it."""

PLACED_S = 10.0
"""Longest wait for Ray to place what there is room for in all, which takes it milliseconds."""


class Places:
    """The bundles of one role's processes, by rank; guests have those of their hosts."""

    def __init__(self, role: RoleSpec, host: Places | None = None, *, has_guests: bool = False) -> None:
        """`host`: places of a group with whose processes these take turns, rank i in the bundle of its rank
        i; `has_guests`: another group's are in these."""
        self._role, self._host, self._has_guests = role, host, has_guests
        self._group: PlacementGroup | None = None
        self._added: list[PlacementGroup] = []
        """Of ranks beyond the role's `workers`, a bundle each."""

    @property
    def reserved(self) -> bool:
        """Ray was asked for them, and they were not given back."""
        return self._group is not None

    def reserve(self) -> None:
        """Ask Ray for room on its nodes alone; returns at once."""
        from ray.util.placement_group import placement_group

        if self._group is not None:
            return
        if self._host is not None:
            self._host.reserve()
            self._group = self._host._group
        else:
            bundles = [bundle(self._role)] * self._role.workers
            self._group = placement_group(bundles, self._role.placement.upper())

    def give_back(self) -> None:
        """Let Ray have the room, unless it is a host's."""
        from ray.util.placement_group import remove_placement_group

        group, self._group = self._group, None
        if group is not None and self._host is None:
            self.resize(self._role.workers)
            remove_placement_group(group)

    def resize(self, size: int) -> None:
        """Have room for `size` processes. That which the role had from the start is kept, used or not.

        Raises:
            NoRoom: the cluster lacks it; then all is as it was.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        before, wanted = len(self._added), max(0, size - self._role.workers)
        each = bundle(self._role)
        needed = {name: amount * (wanted - before) for name, amount in each.items()}
        free = ray.available_resources()
        if any(amount > free.get(name, 0.0) + 1e-6 for name, amount in needed.items()):
            raise NoRoom("the cluster", "start", shortfall(needed, free))
        while len(self._added) > wanted:
            remove_placement_group(self._added.pop())
        while len(self._added) < wanted:
            self._added.append(placement_group([each]))
        if not all(group.wait(PLACED_S) for group in self._added[before:]):
            self.resize(self._role.workers + before)
            raise NoRoom("the cluster", "start", shortfall(needed, free))

    def strategy(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """Strategy by which Ray starts the process of a rank in its bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        workers = self._role.workers
        if rank >= workers and self._host is None:
            return PlacementGroupSchedulingStrategy(self._added[rank - workers], 0)
        return PlacementGroupSchedulingStrategy(self._group, rank)

    def asked(self) -> dict[str, float]:
        """Resources that one process asks Ray for, within its bundle."""
        if self._host is not None:
            # All else is its host's, which computes nothing meanwhile.
            gpus = self._host._role.gpus * GUEST_SHARE
            return {"GPU": gpus} if gpus else {}
        asked = bundle(self._role)
        if self._has_guests and "GPU" in asked:
            asked["GPU"] *= 1 - GUEST_SHARE
        return asked

    def node_of(self, rank: int) -> str | None:
        """Id of the living node that has the bundle of a rank; None: there is none, or none yet."""
        return self._nodes().get(rank)

    def unplaced(self) -> str:
        """Bundles that are on no living node, with their resources; empty where all are."""
        lacking = self._size - len(self._nodes())
        return f"{lacking} x ({listed(self._bundle)})" if lacking else ""

    def missing(self) -> str:
        """Sum that `unplaced` bundles ask for, free resources, and the difference, in words."""
        import ray

        lacking = self._size - len(self._nodes())
        needed = {name: lacking * amount for name, amount in self._bundle.items()}
        return shortfall(needed, ray.available_resources())

    @property
    def _bundle(self) -> dict[str, float]:
        return bundle(self._role if self._host is None else self._host._role)

    @property
    def _size(self) -> int:
        return (self._role if self._host is None else self._host._role).workers + len(self._added)

    def _nodes(self) -> dict[int, str]:
        """The living nodes that bundles are on, by rank."""
        import ray
        from ray.util.placement_group import placement_group_table

        if self._group is None:
            return {}
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        found: dict[int, str] = {}
        for group in (self._group, *self._added):
            placed = placement_group_table(group).get("bundles_to_node_id", {})
            first = len(found)
            found |= {first + int(index): node for index, node in placed.items()}
        return {rank: node for rank, node in found.items() if node in alive}


def shortfall(needed: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Resources that are asked for, those that are free, and the difference, in words; pure."""
    there = {name: round(free.get(name, 0.0), 4) for name in needed}
    lacking = {name: amount - there[name] for name, amount in needed.items() if amount - there[name] > 1e-6}
    missing = listed(lacking) if lacking else "no node has it in one piece"
    return f"{listed(needed)} asked for, {listed(there)} free in the cluster; missing: {missing}"

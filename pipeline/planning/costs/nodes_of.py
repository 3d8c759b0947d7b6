"""Processes of a run on nodes of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.cluster import by_size
from pipeline.planning.resources import working_roles

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.costs.devices import Device


@dataclass
class UsedNode:
    """One node and what is on it."""

    gpus: float
    """That are left."""
    processes: dict[str, int]
    """Role -> its processes here."""


def laid_out(config: RunConfig, device: Device) -> list[UsedNode]:
    """Nodes that the run needs, filled one after the other, roles that ask for most first, as room is taken
    at the start (`actors.cluster.room`). Without GPUs all is on one."""
    names = config.roles.with_processes(working_roles(config))
    roles = {name: config.roles.of(name) for name in names}
    nodes = [UsedNode(device.per_node, {})]
    for name in by_size(roles):
        role = roles[name]
        together = role.workers if role.placement == "strict_pack" else 1
        apart = role.placement == "strict_spread"
        for _ in range(role.workers // together):
            node = _with_room(nodes, name, together * role.gpus, apart)
            if node is None:
                node = UsedNode(max(device.per_node, together * role.gpus), {})
                nodes.append(node)
            node.gpus -= together * role.gpus
            node.processes[name] = node.processes.get(name, 0) + together
    for guest in (name for name in names if config.roles.alternates(name)):
        for node in nodes:
            if here := node.processes.get(config.roles.host_of(guest)):
                node.processes[guest] = here
    return [node for node in nodes if node.processes]


def _with_room(nodes: list[UsedNode], name: str, gpus: float, apart: bool) -> UsedNode | None:
    return next((n for n in nodes if n.gpus >= gpus and not (apart and name in n.processes)), None)

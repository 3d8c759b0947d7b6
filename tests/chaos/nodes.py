"""A cluster of several nodes on one machine, whose engines' nodes can be lost and replaced."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import psutil

from actors.cluster.trace import BEGINNINGS

SPARE = 1
"""Nodes beyond those that the engines need."""
ENGINE = "engine"
"""Resource of a node that holds one engine."""
HEAD = "head"
"""Resource of the node that holds everything else."""
SMALL: dict[str, Any] = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


class Nodes:
    """A head for the driver and all roles but the engines, and a node for each engine and one more."""

    def __init__(self, engines: int) -> None:
        from ray.cluster_utils import Cluster

        os.environ[BEGINNINGS] = "1"  # Workers have their raylet's environment, not the driver's.
        self._wanted = engines + SPARE
        head = SMALL | {"num_cpus": 4, "resources": {HEAD: 100}}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: list[Any] = []
        self.complete()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def complete(self) -> None:
        """Nodes in place of those that were lost."""
        for node in [node for node in self._nodes if not _runs(node)]:
            self._nodes.remove(node)
            with contextlib.suppress(Exception):  # Half of its processes are gone.
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._nodes) < self._wanted:
            self._nodes.append(self._cluster.add_node(**SMALL, num_cpus=1, resources={ENGINE: 1}))

    def close(self) -> None:
        self._cluster.shutdown()


def _runs(node: Any) -> bool:
    """Its raylet is there."""
    (raylet,) = node.all_processes["raylet"]
    return raylet.process.poll() is None


def raylet_of(pid: int) -> int | None:
    """The raylet that started a process."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid).parent()
        if parent is not None and "raylet" in parent.name():
            return parent.pid
    return None

"""Faster start of a run's local cluster: without processes that it doesn't need, with imports made once.

All that the rest of Raylign uses of this package stands here, and `ray.fast_start: false` leaves it unused.
Nothing computes otherwise because of it, so the package can be deleted with the few lines that name it
(`actors.cluster.connection`, `pipeline.execution.fleet`).
"""

from __future__ import annotations

from actors.cluster.fast_start.fork_server import ForkServer
from actors.cluster.fast_start.lean_ray import lean_cluster

__all__ = ["ForkServer", "lean_cluster"]

"""A local Ray cluster without the processes that only serve people who look at clusters.

`ray.init` of a local cluster also starts an autoscaler, a server for Ray's web pages (even with
`include_dashboard=False`) and a reader of log files. A run on one machine needs none of them, and waits for
some: without them a local cluster is up in half the time (benchmarks/startup.py).
Ray has no setting for it. The names below are Ray's own; one that a release renames is left alone, and a test
says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

NOT_NEEDED = ("start_monitor", "start_api_server", "start_log_monitor")
"""Methods of `ray._private.node.Node`, each of which starts one such process."""
EXTRAS = "get_dashboard_dependency_error"
"""Function of `ray._private.utils` that imports what Ray's web pages need, in the driver too; where it finds
something missing (as in an installation without `ray[default]`), Ray's agent starts with less."""


@contextlib.contextmanager
def without_dashboard() -> Iterator[None]:
    """While it lasts, `ray.init` starts a local cluster's head with what actors need."""
    import ray._private.utils as utils
    from ray._private.node import Node

    changed: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        if hasattr(owner, name):
            changed.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

    for name in NOT_NEEDED:
        put(Node, name, lambda self, *args, **kwargs: None)
    put(utils, EXTRAS, lambda: "not asked for")
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)

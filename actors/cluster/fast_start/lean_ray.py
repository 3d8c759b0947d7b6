"""A local Ray cluster without the processes that only serve people who look at clusters.

`ray.init` of a local cluster also starts an autoscaler, a server for Ray's web pages (even with
`include_dashboard=False`), a reader of log files, and on its node two agents, for statistics and for runtime
environments. A run on one machine needs none of them, and waits for some: without them a local cluster is up
in a third of the time (benchmarks/startup.py). Its workers can come from a fork server.
Ray has no setting for it. The names below are Ray's own; one that a release renames is left alone, and a test
says so. The command line of a node's process is touched for the releases that it was tried with.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NOT_NEEDED = ("start_monitor", "start_api_server", "start_log_monitor")
"""Methods of `ray._private.node.Node`, each of which starts one such process."""
EXTRAS = "get_dashboard_dependency_error"
"""Function of `ray._private.utils` that imports what Ray's web pages need, in the driver too; where it finds
something missing (as in an installation without `ray[default]`), Ray's agent starts with less."""
STARTER = "start_ray_process"
"""Function of `ray._private.services` that starts a node's processes, from their command lines."""
TRIED = "2.60."
"""How versions of Ray begin whose node was seen to do without agents, and with workers of a fork server.
Another one's node gets its command line as it is: an option that it doesn't know would keep it from
starting."""
AGENTS = ("--dashboard_agent_command", "--runtime_env_agent_command")
"""Options of the node's process: what it runs as agents. It wants to have them, and ends when one ends."""
AGENT_PORTS = (
    "--metrics-agent-port",
    "--metrics_export_port",
    "--runtime_env_agent_port",
    "--dashboard_agent_listen_port",
)
"""Options of the node's process: where the agents listen. With 0 it waits until they have said so; -1 is what
an agent says that listens nowhere."""
WORKERS = "--python_worker_command"
"""Option of the node's process: the command line of a worker."""
WORKER_SCRIPT = "default_worker.py"
PRESTARTED = "--num_prestart_python_workers"
"""Option of the node's process: workers that it starts before it is asked to. A driver waits for them."""


@contextlib.contextmanager
def lean_cluster(fork_server: str | None = None) -> Iterator[None]:
    """While it lasts, `ray.init` starts a local cluster's head with what actors need.

    `fork_server`: address of the `ForkServer` that its workers come from.
    """
    import ray
    import ray._private.services as services
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
    start = getattr(services, STARTER, None)

    def start_leaner(command: list[str], process_type: str, *args: Any, **kwargs: Any) -> Any:
        assert start is not None
        if process_type == "raylet" and ray.__version__.startswith(TRIED):
            command = lean_node(command, fork_server)
        return start(command, process_type, *args, **kwargs)

    put(services, STARTER, start_leaner)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def lean_node(command: Sequence[str], fork_server: str | None) -> list[str]:
    """The command line of a node's process with agents that do nothing, and workers from a fork server."""
    options = [word.partition("=")[0] for word in command]
    nothing = shlex.join([sys.executable, "-I", "-S", str(_beside("idle_agent.py"))])
    lean = [word for word, name in zip(command, options) if name not in (*AGENTS, *AGENT_PORTS)]
    lean += [f"{name}={nothing}" for name in AGENTS] + [f"{port}=-1" for port in AGENT_PORTS]
    if fork_server is None:
        return lean
    # Forked ones are up at once, but not before the server has made its imports: nobody should wait.
    asked = [word for word in lean if not word.startswith(PRESTARTED)] + [f"{PRESTARTED}=0"]
    return [_forked(word, fork_server) for word in asked]


def _forked(word: str, fork_server: str) -> str:
    name, _, line = word.partition("=")
    if name != WORKERS:
        return word
    words = shlex.split(line)
    asking = [str(_beside("forked_worker.py")), fork_server]
    for place, part in enumerate(words):
        if Path(part).name == WORKER_SCRIPT:
            return f"{name}={subprocess.list2cmdline([*words[:place], *asking, *words[place:]])}"
    return word


def _beside(name: str) -> Path:
    return Path(__file__).resolve().parent / name

"""A local Ray cluster without the processes that serve only its dashboard.

`ray.init` of a local cluster also starts an autoscaler, the dashboard's server (even with
`include_dashboard=False`), a log monitor, and on its node two agents, for statistics and for runtime
environments. A run on one machine needs none of them, and waits for some: without them a local cluster is up
in a third of the time (benchmarks/startup.py). Its workers can come from a fork server.
Ray has no setting for it. The names below are Ray's own; one that a release renames is left alone, the log
of the run says so, and a test fails. The command line of a node's process is changed only for the releases
that this was tried with.
"""

from __future__ import annotations

import contextlib
import importlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.cluster.ray_private import private

if TYPE_CHECKING:
    from actors.cluster.fast_start.fork_server import ForkServer

NOT_NEEDED = ("start_monitor", "start_api_server", "start_log_monitor")
"""Methods of `ray._private.node.Node`; each starts one of those processes."""
EXTRAS = "get_dashboard_dependency_error"
"""Function of `ray._private.utils` that imports what Ray's dashboard needs, in the driver too; where it finds
something missing (as in an installation without `ray[default]`), Ray's agent starts with less."""
STARTER = "start_ray_process"
"""Function of `ray._private.services` that starts a node's processes, from their command lines."""
TRIED = "2.60."
"""Start of the versions of Ray whose node was seen to run without agents, and with workers of a fork server.
The node of another version gets its command line unchanged: an option that it doesn't know would keep it from
starting."""
AGENTS = ("--dashboard_agent_command", "--runtime_env_agent_command")
"""Options of the node's process: the command lines of its agents. It can't be started without agents, and
ends when one of them ends."""
AGENT_PORTS = (
    "--metrics-agent-port",
    "--metrics_export_port",
    "--runtime_env_agent_port",
    "--dashboard_agent_listen_port",
)
"""Options of the node's process: the ports of its agents. With 0 it waits until an agent reports its port; -1
is what an agent reports that listens nowhere."""
WORKERS = "--python_worker_command"
"""Option of the node's process: the command line of a worker."""
WORKER_SCRIPT = "default_worker.py"
PRESTARTED = "--num_prestart_python_workers"
"""Option of the node's process: workers that it starts before it is asked to. A driver waits for them."""


@contextlib.contextmanager
def lean_cluster(fork_server: ForkServer | None = None) -> Iterator[str]:
    """While it lasts, `ray.init` starts a local cluster's head with what actors need.

    Gives one line that says what is left out and, where this Ray isn't as expected, what is not and why.
    `fork_server`: where its workers come from.
    """
    import ray

    changed: list[tuple[Any, str, Any]] = []
    missing: list[str] = []

    def put(owner: Any, name: str, value: Any) -> Any:
        found = getattr(owner, name, None)
        if found is None:
            missing.append(name)
        else:
            changed.append((owner, name, found))
            setattr(owner, name, value)
        return found

    node = private("ray._private.node", "Node")
    for name in NOT_NEEDED:
        put(node, name, lambda self, *args, **kwargs: None)
    put(_module("ray._private.utils"), EXTRAS, lambda: "not asked for")
    tried = ray.__version__.startswith(TRIED)
    address = fork_server.address if fork_server is not None else None

    def start_leaner(command: list[str], process_type: str, *args: Any, **kwargs: Any) -> Any:
        if process_type == "raylet" and tried:
            command = lean_node(command, address)
        return start(command, process_type, *args, **kwargs)

    start = put(_module("ray._private.services"), STARTER, start_leaner)
    try:
        yield _said(ray.__version__, missing, tried and start is not None, fork_server)
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _module(name: str) -> Any:
    """A module of Ray's; None where this Ray has none of that name."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _said(version: str, missing: Sequence[str], node: bool, fork_server: ForkServer | None) -> str:
    """One line for the log, from the names that this Ray lacks and whether its node is started leaner."""
    why = [f"it has no {', '.join(missing)}"] if missing else []
    if not node:
        why.append(f"agents and workers start in Ray's own way, other ones were tried with Ray {TRIED}x only")
    line = "fast start" if not why else f"fast start in part, as this is Ray {version}: {'; '.join(why)}"
    if fork_server is not None and node:
        line += f"; workers are forked from process {fork_server.pid}, see {fork_server.log}"
    return line


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

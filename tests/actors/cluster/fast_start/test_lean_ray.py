"""A local cluster without the processes that serve only its dashboard."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from actors.cluster.fast_start import ForkServer
from actors.cluster.fast_start.lean_ray import (
    AGENT_PORTS,
    AGENTS,
    EXTRAS,
    NOT_NEEDED,
    PRESTARTED,
    STARTER,
    TRIED,
    WORKER_SCRIPT,
    WORKERS,
    lean_cluster,
    lean_node,
)

NODE = [
    "/ray/raylet",
    "--node_id=7",
    "--python_worker_command=/bin/python /ray/setup_worker.py /ray/default_worker.py --a=b PLACEHOLDER",
    "--metrics-agent-port=0",
    "--num_prestart_python_workers=2",
    "--dashboard_agent_command=/bin/python /ray/agent.py --grpc-port=0",
    "--runtime_env_agent_command=/bin/python /ray/main.py",
]


def test_rays_own_names_are_still_there() -> None:
    """Renamed ones are left alone, and a local start takes three times as long again; so it does with a
    release that was not tried: do, then name it in `TRIED`."""
    import ray
    from ray._private import services, utils
    from ray._private.node import Node

    assert [name for name in NOT_NEEDED if not hasattr(Node, name)] == []
    assert hasattr(utils, EXTRAS)
    assert hasattr(services, STARTER)
    assert ray.__version__.startswith(TRIED)
    source = inspect.getsource(services.start_raylet)
    options = (*AGENTS, *AGENT_PORTS, WORKERS, PRESTARTED)
    assert [name for name in options if name.removeprefix("--") not in source] == []
    assert WORKER_SCRIPT in inspect.getsource(Node.__init__)


def test_what_was_changed_is_put_back() -> None:
    from ray._private import services, utils
    from ray._private.node import Node

    def names() -> list[object]:
        return [*(getattr(Node, n) for n in NOT_NEEDED), getattr(utils, EXTRAS), getattr(services, STARTER)]

    before = names()
    with lean_cluster():
        during = names()
    assert not set(during) & set(before)
    assert names() == before


def test_the_line_for_the_log_says_where_workers_come_from(tmp_path: Path) -> None:
    with lean_cluster() as line:
        assert line == "fast start"
    server = ForkServer([], {}, tmp_path / "server.log")
    with lean_cluster(server) as line:
        assert line == f"fast start; workers are forked from process {server.pid}, see {server.log}"
    server.stop()


def test_a_name_that_ray_lacks_is_left_alone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import utils
    from ray._private.node import Node

    monkeypatch.delattr(Node, "start_log_monitor")
    monkeypatch.delattr(utils, EXTRAS)
    before = Node.start_monitor
    with lean_cluster() as line:
        assert Node.start_monitor is not before
        assert not hasattr(Node, "start_log_monitor")
    assert "it has no start_log_monitor, get_dashboard_dependency_error" in line
    assert Node.start_monitor is before
    assert not hasattr(Node, "start_log_monitor")


def test_a_module_that_ray_lacks_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("node", "utils", "services"):
        monkeypatch.setitem(sys.modules, f"ray._private.{name}", None)
    with lean_cluster() as line:
        assert "it has no start_monitor, start_api_server, start_log_monitor" in line
        assert "agents and workers start in Ray's own way" in line


@pytest.mark.parametrize("version", ["2.60.1", "2.61.0"])
def test_only_a_release_that_was_tried_has_its_nodes_command_line_changed(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private import services

    started: list[list[str]] = []
    monkeypatch.setattr(ray, "__version__", version)
    monkeypatch.setattr(services, STARTER, lambda command, *args, **kwargs: started.append(command))
    server = ForkServer([], {}, tmp_path / "server.log")
    with lean_cluster(server) as line:
        services.start_ray_process(NODE, "raylet")
    server.stop()
    tried = version.startswith(TRIED)
    assert (started == [NODE]) == (not tried)
    assert ("workers are forked" in line) == tried
    assert ("this is Ray 2.61.0: agents and workers start in Ray's own way" in line) == (not tried)


def test_a_nodes_agents_do_nothing_and_its_other_options_stay() -> None:
    lean = lean_node(NODE, None)
    assert lean[:3] == NODE[:3]
    assert "--num_prestart_python_workers=2" in lean
    agents = [word for word in lean if word.startswith(AGENTS)]
    assert len(agents) == 2
    assert all(word.endswith("actors/cluster/fast_start/idle_agent.py") for word in agents)
    assert [word for word in lean if word.startswith(AGENT_PORTS)] == [f"{port}=-1" for port in AGENT_PORTS]


def test_a_nodes_workers_come_from_the_fork_server() -> None:
    lean = lean_node(NODE, "/tmp/socket")
    (workers,) = [word for word in lean if word.startswith(WORKERS)]
    words = workers.partition("=")[2].split()
    assert words[:2] == ["/bin/python", "/ray/setup_worker.py"]
    assert words[2].endswith("actors/cluster/fast_start/forked_worker.py")
    assert words[3:] == ["/tmp/socket", "/ray/default_worker.py", "--a=b", "PLACEHOLDER"]
    assert [word for word in lean if word.startswith(PRESTARTED)] == ["--num_prestart_python_workers=0"]

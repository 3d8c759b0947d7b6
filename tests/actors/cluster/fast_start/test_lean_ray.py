"""A local cluster without the processes that only serve people who look at clusters."""

from __future__ import annotations

import inspect

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

"""Roles on the GPUs of two nodes: Ray's, which are numbers to it, so that no card is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray

SOON = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
"""Ray knows of a dead node after two seconds instead of thirteen."""


def on_logical_gpus(repository: Path, *arguments: str) -> dict[str, Any]:
    """What `logical_gpus` prints, in a process of its own with a cluster of its own."""
    path = os.pathsep.join([str(repository), str(repository / "tests" / "actors")])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.actors.cluster.logical_gpus", *arguments],
        env={**kept, **SOON, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_logical_gpus(repository, str(tmp_path_factory.mktemp("logs")))


def devices(found: dict[str, Any], role: str) -> list[set[tuple[str, str]]]:
    """(node, number of a GPU there) of all that each process of a role sees."""
    return [{(node, gpu) for gpu in seen.split(",") if gpu} for node, seen in found[role]]


def test_engines_and_ranks_see_their_own_gpus_and_no_others(found: dict[str, Any]) -> None:
    """All eight are taken. With the ranks first, on a node each, the third engine would have found no two."""
    engines, ranks = devices(found, "rollout"), devices(found, "policy")
    assert [len(seen) for seen in engines] == [2, 2, 2]
    assert [len(seen) for seen in ranks] == [1, 1]
    assert len(set.union(*engines, *ranks)) == 8


def test_all_gpus_of_an_engine_are_on_one_node(found: dict[str, Any]) -> None:
    assert [len({node for node, _ in seen}) for seen in devices(found, "rollout")] == [1, 1, 1]


def test_a_role_without_gpus_sees_none(found: dict[str, Any]) -> None:
    assert devices(found, "reward") == [set()]


def test_an_engine_that_takes_the_place_of_a_dead_one_has_its_gpus(found: dict[str, Any]) -> None:
    assert found["again"] == found["rollout"][1]


def test_what_was_on_a_dead_node_waits_for_room_says_what_is_missing_and_starts_on_another_node(
    found: dict[str, Any],
) -> None:
    moved = found["moved"]
    taken = [set(gpus.split(",")) for _, gpus in moved["places"].values()]
    assert {node for node, _ in moved["places"].values()} == {moved["other"]}
    assert len(set.union(*taken)) == sum(map(len, taken)) == 4
    waits, starts = moved["said"][: len(taken)], moved["said"][len(taken) :]
    assert sorted(line.partition(":")[0] for line in waits) == sorted(moved["places"])
    assert all(
        "no other has room; waiting for it for 600 s at most (limits.room): " in line for line in waits
    )
    assert all(re.search(r"0 GPU free in the cluster; missing: \d GPU$", line) for line in waits)
    assert sorted(starts) == sorted(
        f"{who}: its node has died; it starts on another one" for who in moved["places"]
    )


def test_what_the_nodes_cannot_hold_is_refused_with_what_is_missing(found: dict[str, Any]) -> None:
    (in_all,), (on_a_node,), (in_pieces,) = found["refused"].values()
    assert in_all.startswith("roles: 10 GPU asked for (roles.rollout.workers 5 x gpus 2), the cluster has 8")
    assert "no single node has 0.1 CPU, 8 GPU" in on_a_node
    assert (
        "roles.policy: 1 of 1 x (0.1 CPU, 2 GPU) find no node with room: they lack 0.1 CPU, 2 GPU"
        in in_pieces
    )


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_gives_the_workers_of_an_engine_its_gpus_and_no_others(
    repository: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """In an actor of a placement group, with the executor that starts its own processes."""
    found = on_logical_gpus(repository, str(tmp_path), str(tiny_base))
    for workers in found["workers"]:
        assert len(set(workers)) == 1
        assert len(workers[0].split(",")) == len(workers) == 2
    first, second = found["drawn"]
    assert first == second != []

"""Two nodes of four GPUs that are numbers alone, and where the processes of roles come to be on them.

python -m tests.actors.cluster.logical_gpus LOG_DIR         # prints one line of JSON: where
python -m tests.actors.cluster.logical_gpus LOG_DIR BASE    # the same of vLLM's workers
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from actors.cluster.connection import check_cluster, start_ray, stop_ray
from actors.cluster.environment import engine_environment, trainer_environment
from actors.cluster.room import by_size
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure, UserError

NODES, GPUS = 2, 4
NODE = {"num_cpus": 2, "num_gpus": GPUS, "object_store_memory": 100 * 2**20, "include_dashboard": False}
ROLES = {
    "policy": RoleSpec(workers=2, gpus=1, cpus=0.1, placement="spread"),
    "rollout": RoleSpec(workers=3, gpus=2, cpus=0.1),
    "reward": RoleSpec(workers=1, cpus=0.1),
}
TOO_MUCH = {
    "in all": {"rollout": RoleSpec(workers=5, gpus=2, cpus=0.1)},
    "on a node": {"rollout": RoleSpec(workers=1, gpus=8, cpus=0.1)},
    "in pieces": {
        "policy": RoleSpec(workers=1, gpus=2, cpus=0.1),
        "rollout": RoleSpec(workers=2, gpus=3, cpus=0.1),
    },
}


def main() -> None:
    from ray.cluster_utils import Cluster

    directory, bases = Path(sys.argv[1]), sys.argv[2:]
    cluster = Cluster()
    for _ in range(NODES):
        cluster.add_node(**NODE)
    groups: list[WorkerGroup] = []
    try:
        start_ray(cluster.address)
        if bases:
            print(json.dumps(engines(directory, groups, *bases)))
        else:
            found = placed(directory, groups)
            print(json.dumps(found | {"moved": moved(cluster, groups, found)}))
    finally:
        for group in groups:
            group.shutdown()
        stop_ray()
        cluster.shutdown()


def placed(directory: Path, groups: list[WorkerGroup]) -> dict[str, Any]:
    """Places of all processes, that of an engine which was replaced, and what is refused."""
    check_cluster(ROLES)
    found: dict[str, Any] = {"refused": {name: refusal(roles) for name, roles in TOO_MUCH.items()}}
    for name in by_size(ROLES):
        env = {} if name == "rollout" else trainer_environment(ROLES[name].gpus > 0)
        group = WorkerGroup(name, ROLES[name], LimitsSpec(start=90, stop=1), directory, env=env)
        groups.append(group.reserve())
    for group in groups:
        group.start()
    for group in groups:
        group.ready().build("duties:Duty").result()
        found[group.name] = group.call("place")
    with contextlib.suppress(RunFailure):
        groups[0].call_rank(1, "die", 0)
    groups[0].restart(1)
    groups[0].rebuild(1)
    return found | {"again": groups[0].call_rank(1, "place")}


def moved(cluster: Any, groups: list[WorkerGroup], found: dict[str, Any]) -> dict[str, Any]:
    """The node that isn't the driver's dies, and another one joins once the run has said that it waits for
    it: the nodes, what was said, and the places of all that had GPUs of the dead one."""
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    said: list[str] = []
    lost = [
        (group, rank)
        for group in groups
        for rank, (where, _) in enumerate(found[group.name])
        if where == node.node_id and group.role.gpus
    ]
    with ThreadPoolExecutor() as pool:
        for group, rank in lost:
            group.note = said.append
            with contextlib.suppress(RunFailure):
                group.call_rank(rank, "place")
            group.restart(rank)
        coming = [pool.submit(group.rebuild, rank) for group, rank in lost]
        until = time.monotonic() + 90
        while len(said) < len(lost) and time.monotonic() < until:
            time.sleep(0.1)
        other = cluster.add_node(**NODE)
        for one in coming:
            one.result()
    places = {group.who(rank): group.call_rank(rank, "place") for group, rank in lost}
    return {"dead": node.node_id, "other": other.node_id, "said": said, "places": places}


def engines(directory: Path, groups: list[WorkerGroup], base: str) -> dict[str, Any]:
    """GPUs that each worker of two tensor-parallel vLLM engines sees, and what the engines draw. Their
    kernels are the CPU's."""
    from actors.batches.generations import SamplingSpec
    from actors.rollout.engine import EngineSpec
    from actors.rollout.remote import ROLLOUT, rollout_group

    env = engine_environment(gpu=False)
    group = rollout_group(RoleSpec(workers=2, gpus=2), LimitsSpec(stop=10), directory, env=env)
    groups.append(group)
    group.start().ready().build(ROLLOUT, EngineSpec(max_model_len=128, tensor_parallel_size=2)).result()
    group.call("load", base, phase="load")
    made = group.call("generate", [[5, 6, 7]], SamplingSpec(max_tokens=8), [1], phase="generate")
    return {
        "workers": group.call("_llm.collective_rpc", devices_seen),
        "drawn": [one.token_ids.tolist() for one in made],
    }


def devices_seen(worker: Any) -> str | None:
    """In a vLLM worker."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def refusal(roles: dict[str, RoleSpec]) -> list[str]:
    try:
        check_cluster(roles)
    except UserError as error:
        return list(error.problems)
    return []


if __name__ == "__main__":
    main()

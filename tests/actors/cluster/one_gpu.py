"""A cluster of eight GPUs that Ray counts and nobody has: who is told to use which. Prints one line of JSON.

A process of its own, as the cluster of the other tests has no GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import ray

from actors.cluster.connection import import_ray
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup

LIMITS = LimitsSpec(start=120, stop=1)


def visible(group: WorkerGroup) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each process of a group."""
    asked = [group.submit_work(rank, "os:getenv", "CUDA_VISIBLE_DEVICES") for rank in range(group.size)]
    return [one.result() for one in asked]


def main(logs: Path) -> None:
    import_ray()
    ray.init(num_cpus=4, num_gpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    policy = WorkerGroup("policy", RoleSpec(workers=3, gpus=1), LIMITS, logs, has_guests=True).start()
    rollout = WorkerGroup("rollout", RoleSpec(workers=2), LIMITS, logs, beside=policy).start()
    reference = WorkerGroup("reference", RoleSpec(workers=1, gpus=1), LIMITS, logs).start()
    groups = {"policy": policy, "rollout": rollout, "reference": reference}
    found: dict[str, object] = {name: visible(group.ready()) for name, group in groups.items()}
    found["free"] = ray.available_resources().get("GPU", 0)
    os.kill(rollout.pids()[1], signal.SIGKILL)
    rollout.look_after([1])
    rollout.restart(1)
    found["restarted"] = visible(rollout)
    rollout.shutdown()
    found["policy without engines"] = visible(policy)
    print(json.dumps(found))
    for group in (policy, reference):
        group.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Ray: the cluster of a run, the processes of a role, calls into them under deadlines."""

from actors.cluster.connection import check_cluster, is_local, local_resources, start_ray, stop_ray
from actors.cluster.environment import actor_environment
from actors.cluster.futures import GroupFuture, WorkerFuture
from actors.cluster.spec import LimitsSpec, RaySpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup

__all__ = [
    "GroupFuture",
    "LimitsSpec",
    "RaySpec",
    "RoleSpec",
    "WorkerFuture",
    "WorkerGroup",
    "actor_environment",
    "check_cluster",
    "is_local",
    "local_resources",
    "start_ray",
    "stop_ray",
]

"""Ray: the cluster of a run, the processes of a role, calls into them under deadlines."""

from actors.cluster.connection import (
    check_cluster,
    import_ray,
    is_local,
    local_memory,
    local_resources,
    ray_lost,
    start_ray,
    stop_ray,
)
from actors.cluster.environment import SHIPPED, actor_environment, passed_on
from actors.cluster.futures import AgreedFuture, GroupFuture, WorkerFuture, look_up, looking_up
from actors.cluster.independent import bring_up
from actors.cluster.joined_cluster import asks_for_token, match_tokens
from actors.cluster.measured_limits import MeasuredLimits
from actors.cluster.ray_private import MODE, TRIED, head_address, private, use_token
from actors.cluster.room import by_size
from actors.cluster.scratch import Scratch
from actors.cluster.spec import LimitsSpec, RaySpec, RoleSpec, splits_experts, splits_layers
from actors.cluster.supervision import Replaced, Supervision
from actors.cluster.turn_plan import EngineBytes, Offload
from actors.cluster.turns import OneDevice, Turns
from actors.cluster.worker_group import WorkerGroup

__all__ = [
    "MODE",
    "SHIPPED",
    "TRIED",
    "AgreedFuture",
    "EngineBytes",
    "GroupFuture",
    "LimitsSpec",
    "MeasuredLimits",
    "Offload",
    "OneDevice",
    "RaySpec",
    "Replaced",
    "RoleSpec",
    "Scratch",
    "Supervision",
    "Turns",
    "WorkerFuture",
    "WorkerGroup",
    "actor_environment",
    "asks_for_token",
    "bring_up",
    "by_size",
    "check_cluster",
    "head_address",
    "import_ray",
    "is_local",
    "local_memory",
    "local_resources",
    "look_up",
    "looking_up",
    "match_tokens",
    "passed_on",
    "private",
    "ray_lost",
    "splits_experts",
    "splits_layers",
    "start_ray",
    "stop_ray",
    "use_token",
]

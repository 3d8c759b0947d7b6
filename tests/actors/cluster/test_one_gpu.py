"""Trainer and engine in one bundle of Ray: the same GPU for rank i and engine i, by Ray's count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.cluster.environment import ALLOCATOR, trainer_environment
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup

LIMITS = LimitsSpec()


@pytest.mark.ray
def test_engine_i_is_on_the_gpu_of_rank_i_also_when_it_is_replaced_and_costs_no_other_one(
    repository: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.actors.cluster.one_gpu", str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(set(found["policy"]) | set(found["reference"])) == 3 + 1
    assert found["rollout"] == found["policy"][:2]
    assert found["free"] == 8 - 3 - 1
    assert found["restarted"] == found["rollout"]
    assert found["policy without engines"] == found["policy"]


@pytest.mark.parametrize(("gpus", "ranks", "engines"), [(1, {"GPU": 0.5}, {"GPU": 0.5}), (0, {}, {})])
def test_rank_and_engine_share_out_what_the_rank_reserves(
    tmp_path: Path, gpus: int, ranks: dict[str, float], engines: dict[str, float]
) -> None:
    role = RoleSpec(cpus=2, gpus=gpus, resources={"big": 1})
    policy = WorkerGroup("policy", role, LIMITS, tmp_path, has_guests=True)
    rollout = WorkerGroup("rollout", RoleSpec(), LIMITS, tmp_path, beside=policy)
    assert policy._places.asked() == {"CPU": 2, "big": 1, **ranks}
    assert rollout._places.asked() == engines


def test_memory_that_grows_in_place_is_not_for_ranks_that_hand_out_its_handles() -> None:
    assert ALLOCATOR not in trainer_environment(gpu=True, has_guests=True)
    assert ALLOCATOR in trainer_environment(gpu=True)

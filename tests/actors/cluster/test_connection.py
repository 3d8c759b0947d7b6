"""A cluster that is too small is refused before anything starts, with the sum."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from actors.cluster.connection import check_cluster, local_resources, shortages, start_ray
from actors.cluster.environment import import_root
from actors.cluster.spec import RoleSpec, bundle
from actors.errors import RunFailure, UserError


def test_roles_that_fit_are_accepted() -> None:
    roles = {"policy": RoleSpec(workers=2, cpus=0.5), "rollout": RoleSpec(cpus=1)}
    assert shortages(roles, [{"CPU": 2.0}]) == []


def test_the_refusal_gives_the_sum_and_each_roles_part() -> None:
    roles = {"policy": RoleSpec(workers=2, cpus=1), "reference": RoleSpec(cpus=0.5)}
    (problem,) = shortages(roles, [{"CPU": 1.0}, {"CPU": 1.0}])
    assert (
        "2.5 CPU asked for (roles.policy.workers 2 x cpus 1 + roles.reference.workers 1 x cpus 0.5)"
        in problem
    )
    assert "the cluster has 2; lower workers or cpus to 2 together, or name a cluster" in problem


def test_every_resource_that_is_short_is_listed_at_once() -> None:
    roles = {"policy": RoleSpec(cpus=4, gpus=1, resources={"fast": 1})}
    problems = shortages(roles, [{"CPU": 2.0}])
    assert [problem.split()[2] for problem in problems] == ["CPU", "GPU", "fast"]


def test_a_role_that_shares_anothers_processes_asks_for_nothing() -> None:
    roles = {"policy": RoleSpec(cpus=2), "reference": RoleSpec(share="policy")}
    assert shortages(roles, [{"CPU": 2.0}]) == []


def test_a_process_must_fit_on_one_node() -> None:
    (problem,) = shortages({"policy": RoleSpec(gpus=4)}, [{"CPU": 8.0, "GPU": 2.0}] * 2)
    assert "no single node has 0.25 CPU, 4 GPU" in problem


def test_what_is_not_there_at_all_is_to_be_left_out() -> None:
    (problem,) = shortages({"policy": RoleSpec(gpus=1)}, [{"CPU": 8.0, "GPU": 0.0}], "this machine")
    assert (
        "1 GPU asked for (roles.policy.workers 1 x gpus 1), this machine has none; leave gpus out" in problem
    )


def test_workers_that_must_be_apart_need_as_many_nodes() -> None:
    roles = {"policy": RoleSpec(workers=2, placement="strict_spread")}
    (problem,) = shortages(roles, [{"CPU": 8.0}], "this machine")
    assert "strict_spread puts 2 workers on as many nodes, this machine has 1" in problem
    assert not shortages(roles, [{"CPU": 8.0}] * 2)


def test_without_ray_the_cluster_that_would_be_started_is_asked() -> None:
    with pytest.raises(UserError, match=r"roles: 1e\+06 CPU asked for"):
        check_cluster({"policy": RoleSpec(cpus=1e6)})
    assert local_resources()["CPU"] >= 1


def test_a_bundle_names_only_what_is_asked_for() -> None:
    assert bundle(RoleSpec(cpus=0.5, resources={"node:big": 1})) == {"CPU": 0.5, "node:big": 1.0}


def test_sharing_excludes_resources_of_ones_own() -> None:
    with pytest.raises(ValueError, match="can't set cpus, workers"):
        RoleSpec(share="policy", cpus=1, workers=2)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "nothing answers at 127.0.0.1:1"),
        ("ray://head:10001", "Ray Client address"),
        ("somewhere", "neither auto nor host:port"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, says: str) -> None:
    import ray

    if ray.is_initialized():
        pytest.skip("this process is connected already")
    began = time.monotonic()
    with pytest.raises(UserError, match=says):
        start_ray(address)
    assert time.monotonic() - began < 10


def test_what_a_run_starts_imports_from_where_this_process_does(repository: Path) -> None:
    assert Path(import_root()) == repository


def test_a_local_cluster_that_does_not_come_up_is_a_failure_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def too_slow(**settings: object) -> None:
        raise Exception("The current node timed out during startup.\nMore of it.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", too_slow)
    with pytest.raises(RunFailure) as caught:
        start_ray()
    assert str(caught.value).startswith(
        "ray failed in phase 'start': The current node timed out during startup.\n  next: try again"
    )

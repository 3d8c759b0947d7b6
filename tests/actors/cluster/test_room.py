"""Roles that a cluster can't hold are refused, with what is missing."""

from __future__ import annotations

from actors.cluster.room import by_size, shortages
from actors.cluster.spec import RoleSpec


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


def test_what_is_packed_strictly_needs_room_for_all_of_it_on_one_node() -> None:
    roles = {"policy": RoleSpec(workers=3, gpus=2, placement="strict_pack")}
    (problem,) = shortages(roles, [{"CPU": 8.0, "GPU": 4.0}] * 2)
    assert "strict_pack puts 3 workers on one node, and no single node has 0.75 CPU, 6 GPU" in problem
    assert shortages(roles, [{"CPU": 8.0, "GPU": 6.0}]) == []


def test_gpus_that_are_left_over_on_several_nodes_make_no_room_for_an_engine() -> None:
    """Of two nodes with three GPUs each, one and one are left beside two engines of two."""
    roles = {"rollout": RoleSpec(workers=3, gpus=2)}
    (problem,) = shortages(roles, [{"CPU": 8.0, "GPU": 3.0}] * 2)
    assert (
        "roles.rollout: 1 of 3 x (0.25 CPU, 2 GPU) find no node with room: they lack 0.25 CPU, 2 GPU"
        in problem
    )
    assert shortages(roles, [{"CPU": 8.0, "GPU": 4.0}] * 2) == []


def test_engines_are_given_their_nodes_before_ranks_that_fit_anywhere() -> None:
    roles = {"policy": RoleSpec(workers=2, gpus=1), "rollout": RoleSpec(workers=3, gpus=2)}
    assert shortages(roles, [{"CPU": 8.0, "GPU": 4.0}] * 2) == []
    assert shortages(roles, [{"CPU": 8.0, "GPU": 5.0}, {"CPU": 8.0, "GPU": 3.0}]) == []


def test_what_asks_for_most_on_one_node_takes_its_room_first() -> None:
    roles = {
        "policy": RoleSpec(workers=2, gpus=1),
        "critic": RoleSpec(workers=4, gpus=1, placement="strict_pack"),
        "reward": RoleSpec(cpus=4),
        "reference": RoleSpec(share="policy"),
        "rollout": RoleSpec(gpus=2),
    }
    assert by_size(roles) == ["critic", "rollout", "policy", "reward"]


def test_workers_that_must_be_apart_find_no_room_where_nodes_are_full() -> None:
    roles = {
        "policy": RoleSpec(workers=2, gpus=1, placement="strict_spread"),
        "rollout": RoleSpec(workers=1, gpus=4),
    }
    (problem,) = shortages(roles, [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}])
    assert "roles.policy: 1 of 2 x (0.25 CPU, 1 GPU) find no node with room" in problem

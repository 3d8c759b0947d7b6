"""A cluster that is too small is refused before anything starts, with the sum."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from actors.cluster.connection import check_cluster, local_resources, start_ray
from actors.cluster.environment import import_root
from actors.cluster.spec import RoleSpec, bundle
from actors.errors import RunFailure, UserError


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

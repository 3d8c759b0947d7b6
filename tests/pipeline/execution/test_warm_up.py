"""Imports are made by one process for all on this machine's CPUs, by each process for itself elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.cluster.connection import is_local
from actors.trainer.remote import HOST_MODULES
from pipeline.artifacts.run_directory import RunDirectory
from pipeline.config.run_config import RunConfig
from pipeline.execution import fleet as module
from pipeline.execution.fleet import Fleet

STAGE = {"type": "sft", "data": {"source": "builtin:arithmetic", "split": "train"}, "batch_size": 2}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What each fork server was started with; none really is."""
    asked: list[tuple[Any, ...]] = []

    class Server:
        def __init__(self, *args: Any) -> None:
            asked.append(args)

        def stop(self) -> None:
            asked.append(("stopped",))

    monkeypatch.setattr(module, "ForkServer", Server)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return asked


def warm(tmp_path: Path, **settings: Any) -> None:
    config = RunConfig(name="w", output_dir=tmp_path, stages={"sft": STAGE}, **settings)  # type: ignore[arg-type]
    with Fleet(config, RunDirectory(tmp_path, "w"), {}) as fleet:
        fleet.preload_imports()


def test_a_local_run_on_cpus_imports_once_with_its_roles_threads(
    tmp_path: Path, started: list[tuple[Any, ...]]
) -> None:
    warm(tmp_path, roles={"policy": {"workers": 2, "threads": 2}}, model={"base": "assets/tiny-moe"})
    (modules, env, log), end = started
    assert modules == HOST_MODULES
    assert env["OMP_NUM_THREADS"] == "2"
    assert log == tmp_path / "logs" / "fork-server.log"
    assert end == ("stopped",)


@pytest.mark.parametrize(
    "settings",
    [
        {"ray": {"address": "head:6379"}},
        {"ray": {"fast_start": False}},
        {"roles": {"policy": {"gpus": 1}}},
        {
            "roles": {"policy": {"threads": 2}, "rollout": {"workers": 1}},
            "eval": {"data": {"source": "builtin:arithmetic", "split": "test"}},
        },
    ],
    ids=["cluster", "switched off", "gpus", "threads differ"],
)
def test_elsewhere_each_process_imports_for_itself(
    settings: dict[str, Any], tmp_path: Path, started: list[tuple[Any, ...]]
) -> None:
    warm(tmp_path, model={"base": "assets/tiny-moe"}, **settings)
    assert started == []


def test_a_cluster_that_the_environment_names_is_not_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert not is_local(None)
    assert is_local("local")
    monkeypatch.delenv("RAY_ADDRESS")
    assert is_local(None)
    assert not is_local("head:6379")

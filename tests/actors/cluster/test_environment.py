"""Environment variables of actors: what differs on GPUs, and what the user has set."""

from __future__ import annotations

import pytest

from actors.cluster.environment import ALLOCATOR, CORE_APART, DEVICES, engine_environment, trainer_environment


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ALLOCATOR, CORE_APART):
        monkeypatch.delenv(name, raising=False)


def test_memory_of_ranks_on_gpus_grows_in_place_and_that_of_engines_does_not() -> None:
    assert trainer_environment(gpu=True) == {ALLOCATOR: "expandable_segments:True"}
    assert ALLOCATOR not in trainer_environment(gpu=False)
    assert ALLOCATOR not in engine_environment(gpu=True)


def test_a_rank_on_the_cpu_sees_no_gpus_of_its_node() -> None:
    assert trainer_environment(gpu=False) == {DEVICES: ""}
    assert DEVICES not in {**trainer_environment(gpu=True), **engine_environment(gpu=True)}, "Ray sets it"


def test_an_allocator_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOCATOR, "max_split_size_mb:64")
    assert trainer_environment(gpu=True) == {ALLOCATOR: "max_split_size_mb:64"}


def test_an_engines_core_is_in_its_process_on_cpus_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert engine_environment(gpu=False)[CORE_APART] == "0"
    assert CORE_APART not in engine_environment(gpu=True), "there vLLM decides"
    monkeypatch.setenv(CORE_APART, "1")
    assert engine_environment(gpu=False)[CORE_APART] == "1"

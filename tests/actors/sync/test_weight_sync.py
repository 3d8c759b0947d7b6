"""The policy's weights in two engines: versions, engines that die on the way, engines that come back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.batches.batch import Batch
from actors.batches.generations import SamplingSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure
from actors.sync.engine_set import EngineSet
from actors.sync.engine_state import WeightsState
from actors.sync.spec import SyncSpec
from actors.sync.weight_sync import WeightSync
from tests.actors.sync.sync_faults import PARTS, PROBES, connected, started

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


@pytest.fixture(scope="module")
def groups(
    ray_cluster: None, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WorkerGroup, WorkerGroup]]:
    both = started(tiny_base, tmp_path_factory.mktemp("sync") / "logs", engines=2)
    yield both
    for group in both:
        group.shutdown()


@pytest.fixture(scope="module")
def sync(groups: tuple[WorkerGroup, WorkerGroup], tiny_base: Path) -> WeightSync:
    return connected(tiny_base, *groups)


def apart(sync: WeightSync, rank: int) -> float:
    """Largest |log-probability difference| of an engine from the trainer, over tokens that no probe has."""
    ids = [[(11 * i + 5 * p) % 200 + 20 for i in range(30)] for p in range(3)]
    batch = Batch.from_sequences(ids, [np.arange(30) > 0] * 3)
    engine = np.concatenate(sync.rollout.call_rank(rank, "score_tokens", ids, [1] * 3))
    return float(np.abs(engine - sync.policy.call("scores.token_logprobs", batch, "policy")[0]).max())


def served(sync: WeightSync) -> list[int]:
    """The version that each engine writes on what it generates."""
    sampling = SamplingSpec(max_tokens=2)
    return [made.version for made in sync.rollout.call("generate", PROBES[:1], sampling, phase="generate")]


def killed_and_back(sync: WeightSync) -> None:
    """Kill the second engine, and bring a new one to the version that is served."""
    os.kill(sync.rollout.pids()[1], signal.SIGKILL)
    with pytest.raises(RunFailure, match="its process died"):
        sync.rollout.call_rank(1, "log")
    sync.engines.bring_back(1)


def clean_log(sync: WeightSync) -> None:
    for rank in sync.engines:
        sync.rollout.call_rank(rank, "plant", "")
    sync.rollout.call("forget_log")


@pytest.mark.parametrize("payload", [PARTS, "merged", "adapter"])
def test_every_push_brings_both_engines_to_the_trainers_weights(
    groups: tuple[WorkerGroup, WorkerGroup], tiny_base: Path, payload: str
) -> None:
    sync = connected(tiny_base, *groups, payload)
    for version in (1, 2, 5):
        sync.policy.call("nudge", version)
        before = apart(sync, 0)
        report = sync.push(version)
        assert before > 1e-2 > 1e-4 > max(apart(sync, rank) for rank in (0, 1))
        assert served(sync) == [version, version]
        assert (report.version, report.payload, report.replaced) == (version, sync.spec.payload, ())
        assert report.probe.arrived == pytest.approx(1, abs=1e-3)
    assert list(report.seconds) == ["gather", "pack", "wire", "load", "verify"]
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert report.tensors == {"adapter": 24, "merged": 56, PARTS: 56}[payload]
    assert 0 < report.share_unchanged_bf16 < 0.5
    assert report.metrics()["sync/seconds"] == pytest.approx(sum(report.seconds.values()))
    assert {f"sync/{key}" for key in ("version", "bytes", *report.seconds)} < set(report.metrics())


def test_an_engine_that_dies_while_staging_lets_nobody_commit_until_it_is_replaced(sync: WeightSync) -> None:
    version = sync.version + 1
    clean_log(sync)
    sync.policy.call("nudge", version)
    sync.rollout.call_rank(0, "plant", "dies while staging")
    report = sync.push(version)
    assert report.replaced == (0,)
    assert sync.rollout.call("log")[1] == [
        f"{what} {version}" for what in ("stage", "discard", "stage", "commit")
    ], "the other engine forgot what it had staged, and served on, until both could commit"
    assert sync.engines[0].generation == 1
    assert served(sync) == [version, version]
    assert max(apart(sync, rank) for rank in (0, 1)) < 1e-4


@pytest.mark.parametrize("fault", ["dies inside commit", "fails inside commit"])
def test_an_engine_lost_inside_commit_is_replaced_and_verified_before_it_serves(
    sync: WeightSync, fault: str
) -> None:
    version = sync.version + 1
    clean_log(sync)
    sync.policy.call("nudge", version)
    sync.rollout.call_rank(1, "plant", fault)
    report = sync.push(version)
    assert report.replaced == (1,)
    assert sync.rollout.call("log") == [[f"stage {version}", f"commit {version}"]] * 2
    assert [sync.engines[rank].state for rank in sync.engines] == [WeightsState.SERVING] * 2
    assert served(sync) == [version, version]
    assert max(apart(sync, rank) for rank in (0, 1)) < 1e-4


@pytest.mark.slow
def test_an_engine_that_dies_between_two_parts_is_lost_and_the_other_gets_them_all(
    groups: tuple[WorkerGroup, WorkerGroup], tiny_base: Path
) -> None:
    sync = connected(tiny_base, *groups, PARTS)
    sync.rollout.call_rank(0, "plant", "dies between two parts")
    version = sync.version + 1
    began = time.monotonic()
    assert sync.push(version).replaced == (0,)
    assert time.monotonic() - began < sync.rollout.limits.sync, "nobody waited for a deadline"
    assert served(sync) == [version, version]
    # The trainer goes on, and an engine that comes back later gets the version as it was sent.
    sync.policy.call("nudge", 78)
    killed_and_back(sync)
    one, other = (sync.rollout.call_rank(rank, "score_tokens", PROBES, [1] * 4) for rank in (0, 1))
    assert max(np.abs(a - b).max() for a, b in zip(one, other)) < 1e-6


@pytest.mark.slow
def test_an_engine_that_dies_on_its_way_to_the_trainer_keeps_nobody_waiting(
    groups: tuple[WorkerGroup, WorkerGroup], tiny_base: Path
) -> None:
    sync = WeightSync(groups[0], EngineSet(groups[1]), SyncSpec(), str(tiny_base), "policy", PROBES)
    sync.rollout.call_rank(0, "plant", "dies on its way to the trainer")
    sync.connect()
    assert (sync.engines[0].generation, sync.engines[1].generation) == (1, 0)
    assert sync.push(1).replaced == ()


def test_an_engine_that_another_call_saw_die_is_replaced_before_it_is_sent_anything(sync: WeightSync) -> None:
    version = sync.version + 1
    sync.policy.call("nudge", version)
    os.kill(sync.rollout.pids()[1], signal.SIGKILL)
    with pytest.raises(RunFailure, match="its process died"):
        sync.rollout.call("expert_load")
    assert sync.push(version).replaced == (1,)
    assert served(sync) == [version, version]


def test_an_engine_that_was_killed_comes_back_with_the_served_version_though_the_trainer_went_on(
    sync: WeightSync,
) -> None:
    target = apart(sync, 1)
    before = sync.rollout.call_rank(1, "score_tokens", PROBES, [1] * 4)
    sync.policy.call("nudge", 77)
    killed_and_back(sync)
    assert target < 1e-4
    after = sync.rollout.call_rank(1, "score_tokens", PROBES, [1] * 4)
    assert max(np.abs(a - b).max() for a, b in zip(before, after)) < 1e-6
    assert served(sync) == [sync.version] * 2
    assert sync.engines[1].state is WeightsState.SERVING

"""The real host in real Ray actors: two ranks learn what one learns, and a killed rank is named."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.algorithms.sft import SftLoss
from actors.batches.batch import Batch
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.errors import RunFailure, UserError
from actors.models.spec import LoraSpec, ModelSpec
from actors.trainer.remote import ModelWorkers, host_group
from actors.trainer.spec import HostSpec, OptimSpec

pytestmark = pytest.mark.ray


def rows(count: int, seed: int) -> Batch:
    """Random rows of 10 to 40 tokens; the second half of each counts."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(10, 40, size=count)
    ids = [generator.integers(5, 250, size=n).tolist() for n in lengths]
    return Batch.from_sequences(ids, [[i >= n // 2 for i in range(n)] for n in lengths])


@pytest.fixture
def hosts(ray_cluster: None, tiny_base: Path, tmp_path: Path) -> Iterator[dict[int, ModelWorkers]]:
    """A host of one rank and a host of two, started together; ranks that die are not replaced."""
    spec = HostSpec(model=ModelSpec(base=str(tiny_base), lora=LoraSpec(r=4)))
    limits = LimitsSpec(stop=2, max_restarts=0)
    groups = {n: host_group(f"policy{n}", RoleSpec(workers=n), limits, tmp_path) for n in (1, 2)}
    made = {n: ModelWorkers(group.start()) for n, group in groups.items()}
    building = [workers.build(spec) for workers in made.values()]
    for each in building:
        each.result()
    for workers in made.values():
        workers.add_adapter("policy")
        workers.prepare_training("policy", OptimSpec(learning_rate=1e-2), 3)
    yield made
    for group in groups.values():
        group.shutdown()


def test_two_ranks_in_actors_learn_what_one_learns(hosts: dict[int, ModelWorkers], tmp_path: Path) -> None:
    loss = SftLoss()
    for step in range(3):
        one, two = (hosts[n].update(rows(8, step), loss, step).result() for n in (1, 2))
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    probe = rows(4, 9)
    one, two = (hosts[n].logprobs(probe, "policy").result() for n in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    every = hosts[2].group.call("scores.logprobs", probe, "policy")
    assert [rank.tolist() for rank in every] == [two.tolist()] * 2, "whoever answers, it is the same"
    for n in hosts:
        for rank in range(n):
            log = (tmp_path / f"policy{n}-{rank}.log").read_text()
            assert "Warning" not in log, log


def test_a_training_rank_killed_between_its_collectives_is_named(hosts: dict[int, ModelWorkers]) -> None:
    workers, loss = hosts[2], SftLoss()
    pid = workers.group.pids()[1]
    pending = [workers.update(rows(256, step), loss, step) for step in range(3)]
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(RunFailure) as caught:
        _ = [each.result() for each in pending]
    assert time.monotonic() - began < 30
    assert (caught.value.who, caught.value.phase) == ("policy2-1", "update")
    assert "its process died" in caught.value.reason


def test_a_base_that_is_not_there_is_the_users_mistake_of_every_rank(
    ray_cluster: None, tmp_path: Path
) -> None:
    group = host_group("policy", RoleSpec(workers=2), LimitsSpec(stop=2), tmp_path).start()
    try:
        with pytest.raises(UserError, match="/no/such/base"):
            ModelWorkers(group).build(HostSpec(model=ModelSpec(base="/no/such/base"))).result()
    finally:
        group.shutdown()

"""New weights while samples are being drawn: they go on, each token says what drew it, and every key and
value that it reads is of the weights that read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.batches.generations import Generations
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure
from actors.rollout.engine import EngineSpec, SamplingSpec
from actors.rollout.remote import ROLLOUT, rollout_group
from tests.actors.rollout.vllm import vllm_cases as cases
from tests.actors.rollout.vllm.vllm_cases import ADAPTER, LONG, SEQUENCES, STARTS, Policy, off, push, scores

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

PROMPTS = [LONG, LONG[:9], LONG]
SAMPLING = SamplingSpec(max_tokens=12)
STEP = 0.0
"""Seconds of a slice: no more than one decoding step."""


@pytest.fixture(scope="module")
def rollout(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    group = rollout_group(RoleSpec(), LimitsSpec(stop=5), tmp_path_factory.mktemp("in-flight") / "logs")
    group.start().ready().build(ROLLOUT, EngineSpec(max_num_seqs=16, max_model_len=512)).result()
    yield group
    group.shutdown()


@pytest.fixture
def policy(rollout: WorkerGroup, tmp_path: Path) -> Policy:
    """The engine's base, freshly loaded, and what trains on it."""
    made = Policy(cases.write_base(tmp_path, "qwen3_moe"), "qwen3_moe")
    rollout.call_rank(0, "load", str(made.base), updatable=True, phase="load")
    return made


def begin(rollout: WorkerGroup, key: int, prompts: list[list[int]], seed: int = 0) -> Generations | None:
    seeds = [seed + i for i in range(len(prompts))]
    made: Generations | None = rollout.call_rank(0, "start_requests", key, STEP, prompts, SAMPLING, seeds)
    return made


def finish(rollout: WorkerGroup, key: int) -> tuple[Generations, int]:
    """The samples, and how many slices they took."""
    for slices in range(1, 100):
        made = rollout.call_rank(0, "poll", key, STEP)
        if made is not None:
            return made, slices
    raise AssertionError("samples that never end")


def test_slices_draw_what_one_call_draws(rollout: WorkerGroup, policy: Policy) -> None:
    whole = rollout.call_rank(0, "generate", PROMPTS, SAMPLING, [5, 6, 7])
    assert begin(rollout, 0, PROMPTS, seed=5) is None
    assert begin(rollout, 1, PROMPTS[:1], seed=90) is None
    sliced, slices = finish(rollout, 0)
    assert slices > 5
    np.testing.assert_array_equal(sliced.token_ids, whole.token_ids)
    other, _ = finish(rollout, 1)
    assert len(other.finish) == 1


def test_samples_go_on_with_new_weights_and_keys_of_these(rollout: WorkerGroup, policy: Policy) -> None:
    assert begin(rollout, 0, PROMPTS) is None
    for _ in range(3):
        assert rollout.call_rank(0, "poll", 0, STEP) is None
    old = Policy(policy.base, "qwen3_moe")
    policy.change(seed=3)
    push(rollout, policy.payload(ADAPTER, 7), keep=True)
    # The proof of a version is asked for while samples wait: it takes none of theirs.
    assert off(scores(rollout), policy.logps(SEQUENCES, STARTS)) < 1e-5
    made, _ = finish(rollout, 0)
    assert set(made.token_versions.tolist()) == {-1, 7}
    for i, ids in enumerate(made.sequences()):
        part = slice(made.offsets[i], made.offsets[i + 1])
        whole, start = [*PROMPTS[i], *ids.tolist()], len(PROMPTS[i])
        now = made.token_versions[part] == 7
        assert (np.diff(now.astype(int)) >= 0).all()
        (before,), (after,) = old.logps([whole], [start]), policy.logps([whole], [start])
        np.testing.assert_allclose(made.logprobs[part], np.where(now, after, before), atol=1e-5)


def test_where_nothing_may_be_in_flight_a_commit_refuses(rollout: WorkerGroup, policy: Policy) -> None:
    assert begin(rollout, 0, PROMPTS) is None
    policy.change(seed=3)
    with pytest.raises(RunFailure, match="samples are still being generated"):
        push(rollout, policy.payload(ADAPTER, 7))

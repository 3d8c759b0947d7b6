"""An engine that sleeps: its memory is given back, nobody can use it, and it wakes as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from actors.cluster.environment import CORE_APART
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation
from actors.rollout.engine import EngineSpec, SamplingSpec
from actors.rollout.remote import ROLLOUT, rollout_group
from actors.rollout.spec import EngineOptions
from actors.rollout.vllm.sleeping import drop_pages

CACHE_GIB = 0.25
PROMPTS = [[5, 60, 70] * 20, [5, 60, 70] * 20 + [100]]
WARM = SamplingSpec(temperature=0.7, max_tokens=12)


def test_whole_pages_of_tensors_are_given_back_and_read_as_zeros() -> None:
    big, beside = torch.ones(64 * 2**20 // 4), torch.ones(1000)
    gc.collect()
    before = psutil.Process().memory_info().rss
    dropped = drop_pages([big[:10], [big[20:], None], beside[:5]])
    assert 63 * 2**20 < dropped <= 64 * 2**20 + 4000
    assert before - psutil.Process().memory_info().rss > 60 * 2**20
    assert big[4096:-4096].sum() == 0
    big.fill_(2)
    assert big.sum() == 2 * len(big)


@pytest.fixture(
    scope="module",
    params=["0", pytest.param("1", marks=pytest.mark.slow)],
    ids=["core in the engine's process", "core apart"],
)
def engine(
    request: pytest.FixtureRequest,
    ray_cluster: None,
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[WorkerGroup]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CORE_APART, request.param)
        group = rollout_group(RoleSpec(), LimitsSpec(stop=5), tmp_path_factory.mktemp("sleep") / "logs")
    options = EngineOptions(max_num_seqs=16, max_model_len=256, kv_cache_gib=CACHE_GIB)
    spec = EngineSpec(**options.model_dump(), enable_sleep_mode=True)
    group.start().ready().build(ROLLOUT, spec).result()
    group.call_rank(0, "load", str(tiny_base), updatable=True, phase="load")
    yield group
    group.shutdown()


def memory(group: WorkerGroup) -> int:
    actor = psutil.Process(group.pids()[0])
    return sum(one.memory_info().rss for one in (actor, *actor.children(recursive=True)))


@pytest.mark.ray
@pytest.mark.vllm
def test_an_engine_sleeps_without_its_cache_refuses_work_and_wakes_with_the_same_answers(
    engine: WorkerGroup,
) -> None:
    made = engine.call_rank(0, "generate", PROMPTS, WARM, [1, 2], phase="generate")
    before = memory(engine)
    assert engine.call_rank(0, "sleep") is False
    assert engine.call_rank(0, "sleep") is False
    assert before - memory(engine) > 0.8 * CACHE_GIB * 2**30
    for method, *args in (
        ("generate", PROMPTS, WARM, [1, 2]),
        ("score_tokens", PROMPTS, [1, 1]),
        ("weights.commit", 0),
    ):
        with pytest.raises(InvariantViolation, match="never both awake"):
            engine.call_rank(0, method, *args)
    assert engine.call_rank(0, "expert_load").sum() > 0
    assert engine.call_rank(0, "wake_up") is True
    again = engine.call_rank(0, "generate", PROMPTS, WARM, [1, 2], phase="generate")
    # The second time nothing of the prompts is in the cache, though their blocks were known.
    assert np.array_equal(made.token_ids, again.token_ids)
    np.testing.assert_allclose(made.logprobs, again.logprobs, atol=1e-5)


@pytest.mark.ray
@pytest.mark.vllm
def test_an_engine_without_a_model_has_nothing_to_give_back(engine: WorkerGroup) -> None:
    """Last: the model is gone after it."""
    engine.call_rank(0, "unload")
    assert engine.call_rank(0, "sleep") is False
    assert engine.call_rank(0, "wake_up") is True

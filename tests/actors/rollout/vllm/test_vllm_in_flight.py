"""New weights while samples are being drawn: they go on, each token says what drew it, and every key and
value that it reads is of the weights that read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure
from actors.rollout.engine import EngineSpec, SamplingSpec
from actors.rollout.remote import ROLLOUT, rollout_group
from tests.actors.rollout.sliced import STEP, begin, finish
from tests.actors.rollout.vllm import vllm_cases as cases
from tests.actors.rollout.vllm.vllm_cases import ADAPTER, LONG, SEQUENCES, STARTS, Policy, off, push, scores

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

PROMPTS = [LONG, LONG[:9], LONG]
SAMPLING = SamplingSpec(max_tokens=12)


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


def test_slices_draw_what_one_call_draws(rollout: WorkerGroup, policy: Policy) -> None:
    whole = rollout.call_rank(0, "generate", PROMPTS, SAMPLING, [5, 6, 7])
    first = begin(rollout, 0, PROMPTS, SAMPLING, [5, 6, 7])
    other = begin(rollout, 1, PROMPTS[:1], SAMPLING, [90])
    sliced, slices = finish(rollout, 0, first)
    assert len(slices) > 5
    assert {one.work.steps for one in slices} == {1}
    so_far = [one.so_far[0] for one in slices[:-1]]
    assert so_far == sorted(so_far)
    assert so_far[-1] == 11
    np.testing.assert_array_equal(sliced.token_ids, whole.token_ids)
    assert len(finish(rollout, 1, other)[0].finish) == 1


def test_samples_that_are_given_back_are_drawn_again_as_they_were(
    rollout: WorkerGroup, policy: Policy
) -> None:
    """Those that have ended by then are not; the engine's others go on, also where it keeps experts."""
    prompts, seeds = [*PROMPTS, *PROMPTS], [5, 6, 7, 8, 9, 10]
    whole = rollout.call_rank(0, "generate", prompts, SAMPLING, seeds)
    first = begin(rollout, 0, prompts, SAMPLING, seeds)
    # Of six requests of twelve tokens none has ended after two steps.
    assert set(first.so_far) == set(range(6))
    kept, slices = finish(rollout, 0, first, give_back=[1, 4, 99])
    assert [one.returned for one in slices if one.returned] == [[1, 4]]
    np.testing.assert_array_equal(kept.token_ids, whole.select([0, 2, 3, 5]).token_ids)
    again, _ = finish(rollout, 1, begin(rollout, 1, [prompts[1], prompts[4]], SAMPLING, [6, 9]))
    np.testing.assert_array_equal(again.token_ids, whole.select([1, 4]).token_ids)


def test_what_has_ended_is_not_given_back(rollout: WorkerGroup, policy: Policy) -> None:
    first = begin(rollout, 0, [LONG[:9]], SAMPLING, [5])
    other = begin(rollout, 1, PROMPTS, SAMPLING, [6, 7, 8])
    finish(rollout, 1, other)  # The first sample ends meanwhile, and waits to be taken.
    made, slices = finish(rollout, 0, first, give_back=[0])
    assert [one.returned for one in slices] == [[], []]
    assert len(made.finish) == 1


def test_samples_go_on_with_new_weights_and_keys_of_these(rollout: WorkerGroup, policy: Policy) -> None:
    begin(rollout, 0, PROMPTS, SAMPLING, [0, 1, 2])
    for _ in range(3):
        assert not rollout.call_rank(0, "advance", 0, STEP).ended
    first = rollout.call_rank(0, "advance", 0, STEP)
    old = Policy(policy.base, "qwen3_moe")
    policy.change(seed=3)
    push(rollout, policy.payload(ADAPTER, 7), keep=True)
    # The proof of a version is asked for while samples wait: it takes none of theirs.
    assert off(scores(rollout), policy.logps(SEQUENCES, STARTS)) < 1e-5
    made, _ = finish(rollout, 0, first)
    assert set(made.token_versions.tolist()) == {-1, 7}
    for i, ids in enumerate(made.sequences()):
        part = slice(made.offsets[i], made.offsets[i + 1])
        whole, start = [*PROMPTS[i], *ids.tolist()], len(PROMPTS[i])
        now = made.token_versions[part] == 7
        assert (np.diff(now.astype(int)) >= 0).all()
        (before,), (after,) = old.logps([whole], [start]), policy.logps([whole], [start])
        np.testing.assert_allclose(made.logprobs[part], np.where(now, after, before), atol=1e-5)


def test_where_nothing_may_be_in_flight_a_commit_refuses(rollout: WorkerGroup, policy: Policy) -> None:
    begin(rollout, 0, PROMPTS, SAMPLING, [0, 1, 2])
    policy.change(seed=3)
    with pytest.raises(RunFailure, match="samples are still being generated"):
        push(rollout, policy.payload(ADAPTER, 7))

"""Engines of several processes: vLLM's core in one of its own (its default on GPUs), and tensor-parallel
workers. They take versions, prove them and die like an engine of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from actors.cluster.environment import CORE_APART
from actors.cluster.spec import LimitsSpec, RoleSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import LinkFailure, RunFailure
from actors.rollout.engine import EngineSpec, SamplingSpec
from actors.rollout.remote import ROLLOUT, rollout_group
from actors.rollout.vllm.intake import Intake
from actors.sync.digests import Algorithm
from actors.sync.payload import pack_adapter
from actors.sync.protocol import digest_of_all
from tests.actors.rollout.sliced import begin, finish
from tests.actors.rollout.vllm import vllm_cases as cases
from tests.actors.rollout.vllm.slot_engines import ATTENTION, MLP, SlotPolicy, slots
from tests.actors.rollout.vllm.vllm_cases import ADAPTER, LONG, MERGED, SEQUENCES, STARTS, Policy, off

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

CORE, WORKERS, BOTH = "core apart", "two workers", "core apart, two workers"
LAYOUTS = {CORE: ("1", 1), WORKERS: ("0", 2), BOTH: ("1", 2)}
"""Name -> vLLM's variable, tensor-parallel workers."""
SPREAD = [CORE, *(pytest.param(name, marks=pytest.mark.slow) for name in (WORKERS, BOTH))]
"""Two workers are synced, read back, killed and replaced in `tests/whole_runs/test_online.py` too."""


@pytest.fixture(scope="module", params=SPREAD)
def spread(
    request: pytest.FixtureRequest,
    ray_cluster: None,
    base_of: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[WorkerGroup, Policy]]:
    """An updatable engine of several processes on a mixture of experts, and a policy on the same base."""
    apart, workers = LAYOUTS[request.param]
    policy = Policy(base_of("qwen3_moe"), "qwen3_moe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CORE_APART, apart)
        group = rollout_group(RoleSpec(), LimitsSpec(stop=10), tmp_path_factory.mktemp("spread"))
    group.start().ready()
    spec = EngineSpec(
        max_num_seqs=16, max_model_len=512, tensor_parallel_size=workers, enable_return_routed_experts=True
    )
    group.build(ROLLOUT, spec).result()
    group.call_rank(0, "load", str(policy.base), updatable=True, phase="load")
    yield group, policy
    group.shutdown()


def processes_of(group: WorkerGroup) -> list[psutil.Process]:
    """vLLM's processes of an engine, the core first where it has one."""
    actor = psutil.Process(group.pids()[0])
    return [child for child in actor.children(recursive=True) if child.name().startswith("VLLM")]


def test_versions_arrive_over_the_channel_whole_in_parts_and_as_adapter(
    spread: tuple[WorkerGroup, Policy],
) -> None:
    group, policy = spread
    assert processes_of(group)
    before = cases.scores(group)
    for version, kind in enumerate([ADAPTER, MERGED]):
        policy.change(seed=version)
        # Of the adapter as a trainer on a GPU would ask for it.
        algorithm: Algorithm = "sums" if kind == ADAPTER else "xxh3"
        report = (
            cases.push_parts(group, policy, version)
            if kind == MERGED
            else cases.push(group, policy.payload(kind, version, algorithm=algorithm))
        )
        assert report.bound == report.expected > 0
        now = cases.scores(group)
        assert off(now, before) > 1e-2
        assert off(now, policy.logps(SEQUENCES, STARTS)) < 1e-4
        read = group.call_rank(0, "weights.readback", version).digests
        assert read == policy.digests(read, algorithm=algorithm)
        proof = group.call_rank(0, "weights.readback", version, digest_of_all(read))
        assert (proof.digest, proof.algorithm, proof.digests) == (digest_of_all(read), algorithm, {})
        before = now


def test_what_can_not_be_loaded_is_refused_with_the_reason_and_the_engine_serves_on(
    spread: tuple[WorkerGroup, Policy],
) -> None:
    group, policy = spread
    factors = policy.payload(ADAPTER, 50).factors()
    foreign = {"model.layers.9.self_attn.o_proj.weight": next(iter(factors.values()))}
    before = cases.scores(group)
    with pytest.raises(RunFailure, match=r"the base has no model\.layers\.9\.self_attn\.o_proj\.weight"):
        cases.push(group, pack_adapter(50, "float32", foreign))
    with pytest.raises(RunFailure, match="version 0 is not newer than version"):
        cases.push(group, policy.payload(ADAPTER, 0))
    assert off(cases.scores(group), before) == 0.0


def test_a_version_can_be_loaded_while_samples_are_in_flight(spread: tuple[WorkerGroup, Policy]) -> None:
    group, policy = spread
    policy.change(seed=7)
    sampling = SamplingSpec(max_tokens=200)
    first = begin(group, 1, [LONG, *SEQUENCES[1:]], sampling, list(range(4)), seconds=0.05)
    assert first.so_far
    cases.push(group, policy.payload(ADAPTER, 60), keep=True)
    made, _ = finish(group, 1, first, seconds=1.0)
    assert made.token_versions[-1] == 60
    assert len(set(made.token_versions.tolist())) == 2
    assert off(cases.scores(group), policy.logps(SEQUENCES, STARTS)) < 1e-4


def test_a_version_is_passed_on_to_another_engine_byte_for_byte(spread: tuple[WorkerGroup, Policy]) -> None:
    group, policy = spread
    policy.change(seed=5)
    payload = policy.payload(ADAPTER, 65)
    trainer = cases.connect(group)
    address = group.call_rank(0, "weights.listen", [1], cases.CHANNEL_S, phase="sync")[1]
    other = Intake(SimpleNamespace(world_size=1, rank_in_group=0), torch.device("cpu"))
    other.connect(address, cases.CHANNEL_S)
    accepting = group.submit_rank(0, "weights.accept", [1], phase="sync")
    other.open("gloo")
    assert accepting.result() == {}
    staging = group.submit_rank(0, "weights.stage", 65, [1], phase="sync")
    with ThreadPoolExecutor(1) as thread:
        passed_on = thread.submit(other.receive)
        trainer.send(payload)
        assert staging.result().digest == payload.digest
        assert passed_on.result().digest == payload.digest
    assert passed_on.result().manifest == payload.manifest
    group.call_rank(0, "weights.discard", 65, phase="sync")
    other.close()
    trainer.close()
    with pytest.raises(LinkFailure):
        group.call_rank(0, "weights.stage", 66, [1], phase="sync")


def test_the_routers_choices_and_loads_come_back_as_those_of_transformers(
    spread: tuple[WorkerGroup, Policy],
) -> None:
    group, policy = spread
    policy.change(seed=3)
    cases.push(group, policy.payload(ADAPTER, 70))
    group.call_rank(0, "expert_load")
    group.call_rank(0, "score_tokens", SEQUENCES[1:], STARTS[1:], phase="sync")
    assert group.call_rank(0, "expert_load").tolist() == policy.expert_load(SEQUENCES[1:]).tolist()
    sampling = SamplingSpec(max_tokens=8)
    made = group.call_rank(0, "generate", SEQUENCES[1:], sampling, [1, 2, 3], phase="generate")
    kept, load = made.routed_experts.experts, group.call_rank(0, "expert_load")
    n_layers, n_experts = load.shape
    by_layer = [np.bincount(kept[:, layer].reshape(-1), minlength=n_experts) for layer in range(n_layers)]
    assert np.array_equal(by_layer, load)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [CORE, WORKERS])
def test_lora_slots_of_several_processes_are_read_back_together(
    ray_cluster: None, base_of: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    apart, workers = LAYOUTS[layout]
    policy = SlotPolicy(base_of("qwen3"), ["attention", "mlp"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CORE_APART, apart)
        group = rollout_group(RoleSpec(), LimitsSpec(stop=10), tmp_path)
    group.start().ready()
    spec = EngineSpec(max_num_seqs=16, max_model_len=512, tensor_parallel_size=workers)
    group.build(ROLLOUT, spec).result()
    room = slots((*ATTENTION, *MLP))
    group.call_rank(0, "load", str(policy.base), updatable=True, slots=room, phase="load")
    assert processes_of(group)
    for version in range(3):
        policy.change(seed=version)
        before = cases.scores(group)
        group.call_rank(0, "weights.stage_payload", policy.staged(version), phase="sync")
        assert group.call_rank(0, "weights.readback", version).digests == policy.slot_digests()
        staged = group.call_rank(0, "score_tokens", SEQUENCES, STARTS, version)
        assert off(staged, policy.logps(SEQUENCES, STARTS)) < 1e-4
        assert off(cases.scores(group), before) == 0.0
        report = group.call_rank(0, "weights.commit", version, phase="sync")
        assert report.bound == report.expected == len(policy.slot_digests())
        assert off(cases.scores(group), staged) == 0.0
    assert cases.samples(group, [LONG]).version == 2
    group.shutdown()


def test_an_engine_dies_with_any_of_its_processes_and_they_with_it(
    spread: tuple[WorkerGroup, Policy],
) -> None:
    """Last: it ends the engine of this module."""
    group, _ = spread
    actor = psutil.Process(group.pids()[0])
    everything = processes_of(group)
    os.kill(everything[-1].pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([actor, *everything], timeout=20)
    assert not alive
    with pytest.raises(RunFailure, match="rollout"):
        cases.scores(group)

"""Versions in the LoRA slots of a running vLLM engine, compared with transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.batches.generations import SamplingSpec
from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure, UserError
from actors.rollout.engine import EngineSpec
from actors.sync.protocol import digest_of_all
from tests.actors.rollout.sliced import begin, finish
from tests.actors.rollout.vllm.slot_engines import ATTENTION, MLP, SlotPolicy, packed, slots
from tests.actors.rollout.vllm.vllm_cases import (
    ADAPTER,
    LONG,
    SEQUENCES,
    STARTS,
    off,
    push,
    samples,
    scores,
)

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

ENGINE = "tests.actors.rollout.vllm.slot_engines:SpoiltSlots"
DENSE, MIXTURE = "qwen3", "qwen3_moe"
TARGETS = {DENSE: ["attention", "mlp"], MIXTURE: ["attention"]}
ENGINE_SPEC = EngineSpec(max_num_seqs=16, max_model_len=512)
MODULES = {DENSE: (*ATTENTION, *MLP), MIXTURE: ATTENTION}


@pytest.fixture(scope="module", params=[DENSE, MIXTURE])
def served(
    request: pytest.FixtureRequest, process: WorkerGroup, base_of: Callable[..., Path]
) -> tuple[WorkerGroup, SlotPolicy]:
    """An engine that serves version 0, and the policy that it is of."""
    policy = SlotPolicy(base_of(request.param), TARGETS[request.param])
    process.build(ENGINE, ENGINE_SPEC).result()
    room = slots(MODULES[request.param])
    process.call_rank(0, "load", str(policy.base), updatable=True, slots=room, phase="load")
    engine = process
    check_rows_without_adapter(engine, policy)
    policy.change(seed=0)
    push(engine, policy.staged(0))
    return engine, policy


def check_rows_without_adapter(engine: WorkerGroup, policy: SlotPolicy) -> None:
    """The base's samples beside scores of a staged slot: vLLM computes both in one step."""
    sampling = SamplingSpec(max_tokens=60)
    alone = engine.call_rank(0, "generate", [LONG], sampling, [1])
    policy.change(seed=9)
    first = begin(engine, 7, [LONG], sampling, [1])
    assert first.so_far
    engine.call_rank(0, "weights.stage_payload", policy.staged(0), phase="sync")
    beside = engine.call_rank(0, "score_tokens", SEQUENCES, STARTS, 0)
    assert off(beside, policy.logps(SEQUENCES, STARTS)) < 1e-5
    made, _ = finish(engine, 7, first)
    engine.call_rank(0, "weights.discard", 0, phase="sync")
    assert made.version == -1
    np.testing.assert_array_equal(made.token_ids, alone.token_ids)
    np.testing.assert_allclose(made.logprobs, alone.logprobs, atol=1e-5)


def next_version(engine: WorkerGroup) -> int:
    return int(samples(engine, [SEQUENCES[1]]).version) + 1


def test_a_staged_version_is_read_back_and_scored_while_the_one_before_is_served(
    served: tuple[WorkerGroup, SlotPolicy],
) -> None:
    engine, policy = served
    for version in (next_version(engine), next_version(engine) + 1):
        before = scores(engine)
        policy.change(seed=version)
        engine.call_rank(0, "weights.stage_payload", policy.staged(version), phase="sync")
        assert off(scores(engine), before) == 0.0, "it serves on"
        assert samples(engine, [LONG]).version == version - 1
        read = engine.call_rank(0, "weights.readback", version)
        assert read.digests == policy.slot_digests()
        proof = engine.call_rank(0, "weights.readback", version, digest_of_all(read.digests))
        assert (proof.digest, proof.digests) == (read.digest, {})
        staged = engine.call_rank(0, "score_tokens", SEQUENCES, STARTS, version)
        assert off(staged, before) > 1e-2
        assert off(staged, policy.logps(SEQUENCES, STARTS)) < 1e-5
        report = engine.call_rank(0, "weights.commit", version, phase="sync")
        assert report.bound == report.expected == len(read.digests)
        assert off(scores(engine), staged) == 0.0


def test_samples_name_their_version_and_use_no_keys_of_another(
    served: tuple[WorkerGroup, SlotPolicy],
) -> None:
    engine, policy = served
    version = next_version(engine)
    samples(engine, [LONG])
    # What is discarded leaves keys behind as well, under the number that comes again.
    policy.change(seed=100)
    engine.call_rank(0, "weights.stage_payload", policy.staged(version), phase="sync")
    engine.call_rank(0, "score_tokens", [LONG], [1], version)
    engine.call_rank(0, "weights.discard", version, phase="sync")
    with pytest.raises(RunFailure, match=f"version {version - 1} is served, not {version}"):
        engine.call_rank(0, "score_tokens", [LONG], [1], version)
    policy.change(seed=version)
    push(engine, policy.staged(version))
    made = samples(engine, [LONG])
    assert made.version == version
    for i, ids in enumerate(made.sequences()):
        (expected,) = policy.logps([[*LONG, *ids.tolist()]], [len(LONG)])
        np.testing.assert_allclose(made.logprobs[made.offsets[i] : made.offsets[i + 1]], expected, atol=1e-5)


def test_a_slot_is_not_given_away_while_samples_are_generated_with_it(
    served: tuple[WorkerGroup, SlotPolicy],
) -> None:
    engine, policy = served
    version, sampling = next_version(engine), SamplingSpec(max_tokens=100)
    first = begin(engine, 8, [LONG], sampling, [1])
    assert first.so_far
    policy.change(seed=version)
    push(engine, policy.staged(version))
    with pytest.raises(RunFailure, match=rf"still being generated with the slot of v{version - 1}\."):
        engine.call_rank(0, "weights.stage_payload", policy.staged(version + 1), phase="sync")
    made, _ = finish(engine, 8, first)
    assert made.version == version - 1, "a sample ends with the slot that it began with"
    assert samples(engine, [LONG]).version == version


def test_what_a_slot_can_not_hold_is_refused_with_the_reasons_and_the_engine_serves_on(
    served: tuple[WorkerGroup, SlotPolicy],
) -> None:
    engine, policy = served
    before, version = scores(engine), next_version(engine)
    q, o = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qo")
    factors = policy.factors()
    stack = {"model.layers.0.mlp.experts.down_proj": factors[o].a.expand(8, -1, -1)}
    foreign = {f"model.layers.9.{n}_proj.weight": factors[o] for n in "ab"}
    wide = {q: type(factors[q])(torch.ones(16, 128), torch.ones(128, 16), 1.0, False)}
    narrow = {o: type(factors[o])(factors[o].a[:, :64], factors[o].b, 1.0, False)}
    experts = {n: type(factors[o])(a, a.transpose(1, 2), 1.0, False) for n, a in stack.items()}
    for spoilt, reason in [
        (
            packed(version, foreign),
            "a_proj.weight is bound to no .*; .*b_proj.weight",
        ),
        (
            packed(version, wide),
            r"has a share \(16, 128\) .* room for \(8, 128\)",
        ),
        (
            packed(version, narrow),
            r"has a share \(4, 64\) .* room for \(8, 128\)",
        ),
        (packed(version, experts), r"keeps no LoRA for model\.layers\.0\.mlp\.experts"),
        (policy.staged(version, torch.bfloat16), "is bfloat16, the engine computes in float32"),
        (policy.payload(ADAPTER, version), "keeps LoRA in slots, and was sent a payload 'adapter'"),
        (policy.staged(version - 1), f"version {version - 1} is not newer"),
    ]:
        with pytest.raises(RunFailure, match=reason):
            push(engine, spoilt)
    assert off(scores(engine), before) == 0.0


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("one element", None),
        ("the room beyond the rank", r"is not zero where it has no weights: model\.layers\.1\.self_attn\.o"),
    ],
)
def test_a_slot_that_is_not_what_was_sent_is_seen_before_it_serves(
    served: tuple[WorkerGroup, SlotPolicy], what: str, reason: str | None
) -> None:
    engine, policy = served
    version = next_version(engine)
    policy.change(seed=version)
    engine.call_rank(0, "weights.stage_payload", policy.staged(version), phase="sync")
    engine.call_rank(0, "spoil", what)
    if reason is not None:
        with pytest.raises(RunFailure, match=reason):
            engine.call_rank(0, "weights.readback", version)
    else:
        read = engine.call_rank(0, "weights.readback", version).digests
        right = policy.slot_digests()
        assert [name for name in right if read[name] != right[name]] == [
            "model.layers.1.self_attn.o_proj.weight B"
        ]
    engine.call_rank(0, "weights.discard", version, phase="sync")
    engine.call_rank(0, "spoil", "nothing")
    assert next_version(engine) == version


@pytest.mark.parametrize("what", ["a layer that takes nothing up", "a layer that the model has not"])
def test_a_version_of_which_not_every_layer_takes_its_part_is_refused_while_staging(
    served: tuple[WorkerGroup, SlotPolicy], what: str
) -> None:
    engine, policy = served
    before, version = scores(engine), next_version(engine)
    engine.call_rank(0, "spoil", what)
    count = len(policy.slot_digests())
    with pytest.raises(RunFailure, match=rf"bound {count - 2} of {count} tensors of version {version}"):
        push(engine, policy.staged(version))
    engine.call_rank(0, "spoil", "nothing")
    assert off(scores(engine), before) == 0.0
    push(engine, policy.staged(version))
    assert off(scores(engine), policy.logps(SEQUENCES, STARTS)) < 1e-5


@pytest.mark.parametrize("architecture", [MIXTURE, pytest.param("mixtral", marks=pytest.mark.slow)])
def test_experts_are_kept_and_read_back_up_to_the_kernel_that_the_cpu_lacks(
    process: WorkerGroup, base_of: Callable[..., Path], architecture: str
) -> None:
    """Last: the engine computes nothing, as its experts' kernel is Triton's."""
    policy = SlotPolicy(base_of(architecture), ["attention", "experts"])
    process.build("tests.actors.rollout.vllm.slot_engines:UncomputedExperts", ENGINE_SPEC).result()
    room = slots((*ATTENTION, "experts"))
    process.call_rank(0, "load", str(policy.base), updatable=True, slots=room, phase="load")
    for version in range(2):
        policy.change(seed=version)
        process.call_rank(0, "weights.stage_payload", policy.staged(version), phase="sync")
        assert process.call_rank(0, "weights.readback", version).digests == policy.slot_digests()
        report = process.call_rank(0, "weights.commit", version, phase="sync")
        # q, k, v, o; gate, up and down of all experts; two layers, A and B.
        assert report.bound == report.expected == 2 * 2 * 7
    policy.change(seed=2)
    process.call_rank(0, "weights.stage_payload", policy.staged(2), phase="sync")
    process.call_rank(0, "spoil_expert")
    read = process.call_rank(0, "weights.readback", 2).digests
    assert [name for name, right in policy.slot_digests().items() if read[name] != right] == [
        "model.layers.1.mlp.experts.gate_up_proj A"
    ]
    half = {name: f for name, f in policy.factors().items() if not name.endswith("down_proj")}
    with pytest.raises(RunFailure, match="a slot takes gate_up_proj and down_proj together"):
        process.call_rank(0, "weights.stage_payload", packed(3, half), phase="sync")


def test_experts_are_refused_where_vllm_has_no_kernel_for_them(
    process: WorkerGroup, base_of: Callable[..., Path]
) -> None:
    process.build(ENGINE, ENGINE_SPEC).result()
    base, room = str(base_of(MIXTURE)), slots((*ATTENTION, "experts"))
    with pytest.raises(UserError, match="no kernel for LoRA on experts on the CPU"):
        process.call_rank(0, "load", base, updatable=True, slots=room, phase="load")

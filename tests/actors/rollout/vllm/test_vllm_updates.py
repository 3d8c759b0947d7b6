"""Weights brought into a running vLLM engine, compared with transformers and with fresh engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.cluster.worker_group import WorkerGroup
from actors.errors import InvariantViolation, RunFailure
from actors.models.lora.adapters import save_adapter
from actors.models.lora.merge import merge_adapter
from actors.models.spec import LoraSpec, ModelSpec
from actors.rollout.engine import EngineSpec
from actors.rollout.remote import ROLLOUT
from actors.sync.payload import pack_adapter, pack_merged
from pipeline.execution.parity import PROBE
from tests.actors.rollout.vllm import vllm_cases as cases
from tests.actors.rollout.vllm.vllm_cases import (
    ADAPTER,
    LONG,
    MERGED,
    SEQUENCES,
    STARTS,
    Policy,
    off,
    push,
    samples,
    scores,
)

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

PROVED = ["qwen3_moe", "mixtral", "qwen3", "gpt_oss"]
"""Experts that keep their names, experts that get others in a checkpoint, no experts, and loaders of vLLM's
that need a workaround. The others are in `test_vllm_architectures.py`."""
FAULTY = "tests.actors.rollout.vllm.vllm_cases"


engine = cases.updatable


@pytest.mark.architectures
@pytest.mark.parametrize("architecture", PROVED)
def test_after_five_adapter_and_five_merged_syncs_the_engine_equals_transformers(
    process: WorkerGroup, base_of: Callable[..., Path], architecture: str
) -> None:
    policy = Policy(base_of(architecture), architecture)
    cases.check_ten_syncs(engine(process, policy.base), policy)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("qwen3_moe", ADAPTER),
        ("qwen3_moe", MERGED),
        ("mixtral", ADAPTER),
        ("qwen3", MERGED),
        ("gpt_oss", ADAPTER),
    ],
)
def test_in_bfloat16_an_updated_engine_is_exactly_a_fresh_one(
    process: WorkerGroup, base_of: Callable[..., Path], tmp_path: Path, architecture: str, kind: str
) -> None:
    # Routers that vLLM keeps in float32 would be finer than a written checkpoint's in a float32 base.
    policy = Policy(base_of(architecture, torch.bfloat16), architecture)
    rollout = cases.updatable(process, policy.base, "bfloat16")
    cases.check_fresh_equal(rollout, policy, kind, tmp_path)


def test_samples_name_their_version_and_use_no_keys_of_the_one_before(
    process: WorkerGroup, base_of: Callable[..., Path]
) -> None:
    policy = Policy(base_of("qwen3"), "qwen3")
    rollout = engine(process, policy.base)
    assert samples(rollout, [LONG]).version == -1
    policy.change(seed=3)
    push(rollout, policy.payload(ADAPTER, 7))
    made = samples(rollout, [LONG])
    assert made.version == 7
    for i, ids in enumerate(made.sequences()):
        (expected,) = policy.logps([[*LONG, *ids.tolist()]], [len(LONG)])
        np.testing.assert_allclose(made.logprobs[made.offsets[i] : made.offsets[i + 1]], expected, atol=1e-5)


def test_the_engine_counts_tokens_per_expert_as_the_routers_of_transformers_choose(
    process: WorkerGroup, base_of: Callable[..., Path]
) -> None:
    policy = Policy(base_of("qwen3_moe"), "qwen3_moe")
    policy.change(seed=3)
    rollout = engine(process, policy.base)
    push(rollout, policy.payload(ADAPTER, 1))
    rollout.call_rank(0, "expert_load")
    rollout.call_rank(0, "score_tokens", SEQUENCES[1:], STARTS[1:], phase="sync")
    counted = rollout.call_rank(0, "expert_load")
    assert counted.tolist() == policy.expert_load(SEQUENCES[1:]).tolist()
    assert not rollout.call_rank(0, "expert_load").any()


def test_every_tensor_of_a_base_is_bound_and_can_be_replaced(
    process: WorkerGroup, base_of: Callable[..., Path]
) -> None:
    policy = Policy(base_of("qwen3_moe"), "qwen3_moe")
    rollout = engine(process, policy.base)
    generator = torch.Generator().manual_seed(5)
    parameters = dict(policy.peft.get_base_model().named_parameters())
    with torch.no_grad():
        for name in sorted(parameters):
            noise = torch.randn(parameters[name].shape, generator=generator)
            parameters[name] += 0.02 * noise
    state = policy.state()
    report = push(rollout, pack_merged(0, "float32", state))
    assert report.bound == report.expected == len(state)
    assert off(scores(rollout), policy.logps(SEQUENCES, STARTS)) < 1e-5


# --- Refused while staging: the engine serves on ---------------------------------------------------


@pytest.fixture(scope="module")
def served(process: WorkerGroup, base_of: Callable[..., Path]) -> Callable[[], tuple[WorkerGroup, Policy]]:
    """An engine of the file's process that serves version 4 of a policy."""

    def make() -> tuple[WorkerGroup, Policy]:
        policy = Policy(base_of("qwen3_moe"), "qwen3_moe")
        policy.change(seed=4)
        rollout = engine(process, policy.base)
        push(rollout, policy.payload(ADAPTER, 4))
        return rollout, policy

    return make


def test_what_can_not_be_loaded_is_refused_before_anything_is_touched(
    served: Callable[[], tuple[WorkerGroup, Policy]],
) -> None:
    rollout, policy = served()
    before = scores(rollout)
    policy.change(seed=5)
    whole = policy.payload(MERGED, 5)
    factors = policy.payload(ADAPTER, 5).factors()
    queries = "model.layers.0.self_attn.q_proj.weight"
    elsewhere = queries.replace("layers.0", "layers.9")
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    refused = {
        "half a fused group: model.layers.0.self_attn.qkv_proj also needs .*k_proj": cases.with_tensors(
            whole, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight")
        ),
        f"half a fused group: .*experts.* also needs {expert}": cases.with_tensors(
            whole, lambda tensors: tensors.pop(expert)
        ),
        f"{elsewhere} is bound to no module": pack_adapter(5, "float32", {elsewhere: factors[queries]}),
        r"makes .*k_proj.weight \(128, 128\), the base has \(64, 128\)": pack_adapter(
            5, "float32", {queries.replace("q_proj", "k_proj"): factors[queries]}
        ),
        "is bfloat16, the engine computes in float32": policy.payload(MERGED, 5, torch.bfloat16),
        "version 4 is not newer than version 4": policy.payload(ADAPTER, 4),
        "version 3 is not newer than version 4": policy.payload(MERGED, 3),
    }
    for reason, payload in refused.items():
        with pytest.raises(RunFailure, match=reason):
            rollout.call_rank(0, "weights.stage_payload", payload, phase="sync")
        with pytest.raises(RunFailure, match="is not staged"):
            rollout.call_rank(0, "weights.commit", payload.manifest.version, phase="sync")
    assert off(scores(rollout), before) == 0.0
    push(rollout, whole)
    assert off(scores(rollout), policy.logps(SEQUENCES, STARTS)) < 1e-5


def test_what_is_discarded_is_not_loaded(served: Callable[[], tuple[WorkerGroup, Policy]]) -> None:
    rollout, policy = served()
    before = scores(rollout)
    policy.change(seed=5)
    rollout.call_rank(0, "weights.stage_payload", policy.payload(ADAPTER, 5), phase="sync")
    rollout.call_rank(0, "weights.discard", 5, phase="sync")
    with pytest.raises(RunFailure, match="version 5 is not staged"):
        rollout.call_rank(0, "weights.commit", 5, phase="sync")
    assert off(scores(rollout), before) == 0.0


# --- Faults that only the read-back shows ----------------------------------------------------------


def swap(one: str, other: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def test_the_readback_names_exactly_the_tensors_that_are_not_the_policys(
    served: Callable[[], tuple[WorkerGroup, Policy]],
) -> None:
    rollout, policy = served()
    policy.change(seed=5)
    whole = policy.payload(MERGED, 5)
    pair = {"model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.1.mlp.experts.6.gate_proj.weight"}
    flipped = "model.layers.1.self_attn.v_proj.weight"

    def flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[flipped].view(torch.uint8)[3, 5] ^= 1

    for version, (change, wrong) in enumerate([(swap(*pair), pair), (flip_a_bit, {flipped})], start=5):
        payload = cases.with_tensors(whole, change)
        push(rollout, pack_merged(version, "float32", {n: t for (n, _), t in payload.tensors().items()}))
        read = rollout.call_rank(0, "weights.readback", version).digests
        expected = policy.digests(read)
        assert {name for name in read if read[name] != expected[name]} == wrong


def test_the_readback_shows_a_base_that_was_sent_in_place_of_the_policy(
    served: Callable[[], tuple[WorkerGroup, Policy]],
) -> None:
    rollout, policy = served()
    policy.change(seed=5)
    factors = {
        name: type(f)(f.a, torch.zeros_like(f.b), f.scaling, f.transposed)
        for name, f in policy.payload(ADAPTER, 5).factors().items()
    }
    push(rollout, pack_adapter(5, "float32", factors))
    read = rollout.call_rank(0, "weights.readback", 5).digests
    assert not set(read.items()) & set(policy.digests(read).items())


# --- A commit that fails costs the engine ----------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("BreakingEngine", "no space left on device"), ("DroppingEngine", "are not bound .*o_proj")],
)
def test_an_engine_that_fails_inside_a_commit_serves_nobody_until_it_is_loaded_again(
    process: WorkerGroup, base_of: Callable[..., Path], fault: str, reason: str
) -> None:
    policy = Policy(base_of("qwen3_moe"), "qwen3_moe")
    policy.change(seed=1)
    rollout = engine(process, policy.base, what=f"{FAULTY}:{fault}")
    with pytest.raises(RunFailure, match=f"(?s)while committing version 1: .*{reason}.*restart this engine"):
        push(rollout, policy.payload(ADAPTER, 1))
    for ask in (lambda: samples(rollout, [LONG]), lambda: scores(rollout)):
        with pytest.raises(RunFailure, match="the engine is lost"):
            ask()
    with pytest.raises(RunFailure, match="the engine is lost"):
        rollout.call_rank(0, "weights.stage_payload", policy.payload(ADAPTER, 2), phase="sync")
    engine(process, policy.base)
    push(rollout, policy.payload(ADAPTER, 2))
    assert off(scores(rollout), policy.logps(SEQUENCES, STARTS)) < 1e-5


def test_a_saved_adapter_needs_no_merged_copy_and_has_its_bits(
    process: WorkerGroup, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    policy = Policy(base_of("qwen3_moe", torch.bfloat16), "qwen3_moe")
    policy.change(seed=1)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    save_adapter(policy.peft, "policy", adapter)
    merge_adapter(None, adapter, merged, check=False)
    spec = EngineSpec(max_num_seqs=16, max_model_len=512, dtype="bfloat16")
    process.build(f"{FAULTY}:DisklessEngine", spec).result()
    found = []
    for what in (adapter, merged):
        process.call_rank(0, "load", str(what), phase="load")
        found.append((scores(process), samples(process, [LONG, *SEQUENCES[1:]])))
    (in_place, of_place), (copied, of_copy) = found
    assert off(in_place, copied) == 0.0
    np.testing.assert_array_equal(of_place.token_ids, of_copy.token_ids)
    np.testing.assert_array_equal(of_place.logprobs, of_copy.logprobs)
    np.testing.assert_array_equal(of_place.token_versions, of_copy.token_versions)


def test_an_adapter_that_no_running_engine_takes_is_merged_on_disk(
    process: WorkerGroup, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM pads these experts on the CPU, and can't reload them."""
    base = cases.write_base(tmp_path / "base", "qwen3_moe", moe_intermediate_size=48)
    policy = Policy(base, "qwen3_moe")
    policy.change(seed=1)
    save_adapter(policy.peft, "policy", tmp_path / "adapter")
    spec = EngineSpec(max_num_seqs=16, max_model_len=512)
    process.build(f"{FAULTY}:DisklessEngine", spec).result()
    with pytest.raises(Exception, match="no space left on device"):
        process.call_rank(0, "load", str(tmp_path / "adapter"), phase="load")
    process.build(ROLLOUT, spec).result()
    process.call_rank(0, "load", str(tmp_path / "adapter"), phase="load")
    assert off(scores(process), policy.logps(SEQUENCES, STARTS)) < 1e-5


def test_a_saved_adapter_that_was_not_loaded_as_handed_over_is_a_failure_and_no_reason_for_a_copy(
    process: WorkerGroup, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    policy = Policy(base_of("qwen3_moe"), "qwen3_moe")
    policy.change(seed=1)
    save_adapter(policy.peft, "policy", tmp_path / "adapter")
    process.build(f"{FAULTY}:ShortEngine", EngineSpec(max_num_seqs=16, max_model_len=512)).result()
    with pytest.raises(InvariantViolation, match=r"bound \d+ of \d+ tensors"):
        process.call_rank(0, "load", str(tmp_path / "adapter"), phase="load")
    with pytest.raises(RunFailure, match="no model is loaded"):
        samples(process, SEQUENCES)


def test_vllm_still_needs_experts_packed_after_a_reload(
    process: WorkerGroup, base_of: Callable[..., Path]
) -> None:
    policy = Policy(base_of("qwen3_moe"), "qwen3_moe")
    policy.change(seed=1)
    rollout = engine(process, policy.base, what=f"{FAULTY}:UnpackedEngine")
    push(rollout, policy.payload(ADAPTER, 1))
    difference = off(scores(rollout), policy.logps(SEQUENCES, STARTS))
    assert difference > 1e-2, (
        "without the workaround the engine is right: this vLLM packs reloaded experts itself. Drop the "
        "workaround: actors/rollout/vllm/repack.py, its call in vllm_side.py, and this test"
    )


def test_an_engine_that_was_not_loaded_for_updates_says_so(
    process: WorkerGroup, base_of: Callable[..., Path]
) -> None:
    process.build(ROLLOUT, EngineSpec()).result()
    process.call_rank(0, "load", str(base_of("qwen3")), phase="load")
    with pytest.raises(RunFailure, match="can't be updated"):
        process.call_rank(0, "weights.commit", 1, phase="sync")
    assert samples(process, [LONG]).version == 0


# --- The probe of architectures that the table lacks -----------------------------------------------


def test_a_probe_finds_an_untested_architecture_right_before_and_after_an_update(
    process: WorkerGroup, tmp_path: Path
) -> None:
    base = cases.write_untested_base(tmp_path / "granite")
    process.build(ROLLOUT, EngineSpec()).result()
    model = ModelSpec(base=str(base), allow_untested=True, lora=LoraSpec(r=4, targets=["attention", "mlp"]))
    report = process.submit_work(0, PROBE, EngineSpec(max_model_len=256), model, phase="load").result()
    assert report.problems == ()
    assert max(report.loaded.max, report.updated.max) < 1e-5
    # The update is real: had the engine ignored it, the second comparison would have shown it.
    assert report.moved > 1e-3


def test_a_probe_names_what_an_engine_gets_wrong(process: WorkerGroup, base_of: Callable[..., Path]) -> None:
    process.build(ROLLOUT, EngineSpec()).result()
    model = ModelSpec(base=str(base_of("qwen3_moe")), lora=LoraSpec(r=4))
    asked = f"{FAULTY}:probe_unpacked", EngineSpec(max_model_len=256), model
    report = process.submit_work(0, *asked, phase="load").result()
    (problem,) = report.problems
    assert problem.startswith("vLLM is wrong after an update in place: probes beyond 0.0001")
    assert report.loaded.max < 1e-5

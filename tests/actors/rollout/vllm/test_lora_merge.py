"""Merge of a payload on the engine's side, compared with the merge that writes checkpoints; no engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from threading import get_ident

import pytest
import torch

from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.lora.merge import adapter_factors, merged_state
from actors.models.quantization.layout import Rounding
from actors.rollout.vllm.lora_merge import Merger
from actors.sync.digests import Digests, digest_of
from actors.sync.payload import fused_groups_of, pack_adapter, pack_merged
from actors.trainer.merged_weights import HostMerge, Tally
from tests.actors.pretend_device import DEVICE, There, second_device
from tests.actors.rollout.vllm.vllm_cases import ADAPTER, MERGED, Policy, write_base


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return policy_of("mixtral", tmp_path_factory.mktemp("mixtral"))


def policy_of(architecture: str, path: Path) -> Policy:
    policy = Policy(write_base(path, architecture), architecture)
    policy.change(seed=1)
    return policy


def merger_of(policy: Policy, dtype: torch.dtype) -> tuple[Merger, BaseCheckpoint]:
    base = BaseCheckpoint(policy.base)
    return Merger(base, policy.peft.get_base_model().config, dtype), base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_merges_into_exactly_what_a_written_checkpoint_holds(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    policy = policy_of(architecture, tmp_path)
    merger, base = merger_of(policy, dtype)
    payload = policy.payload(ADAPTER, 1)
    targets = merger.targets(payload)
    changed = [name for names in targets.values() for name in names]
    state, before = policy.state(dtype), merged_state(policy.peft, None, dtype)
    assert sorted(changed) == sorted(n for n in state if not torch.equal(state[n], before[n]))
    made = merger.merged(payload, sorted(base.shapes), targets)
    assert all(torch.equal(made[name], state[name]) for name in state)
    check_parts(policy, state, dtype)
    assert {shape for names in targets.values() for shape in names.items()} == {
        (name, tuple(base.shapes[name].shape)) for name in changed
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_onto_a_quantised_base_an_adapter_merges_into_the_trainers_bits(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    path = write_base(tmp_path, architecture)
    policy = Policy(path, architecture, ["attention"], quantization="nf4", dtype=name)
    policy.change(seed=1)
    config = policy.peft.get_base_model().config
    base = BaseCheckpoint(path, Rounding("nf4", config, dtype))
    merger, payload, state = Merger(base, config, dtype), policy.payload(ADAPTER, 1), policy.state(dtype)
    made = merger.merged(payload, sorted(base.shapes), merger.targets(payload))
    assert all(torch.equal(made[name], state[name]) for name in state), "those without LoRA among them"
    whole = BaseCheckpoint(path)
    experts = [name for name in base.shapes if "experts" in name and "bias" not in name]
    assert experts
    assert not any(torch.equal(made[name], whole.tensor(name).to(dtype)) for name in experts)
    merge = HostMerge(policy.peft.get_base_model(), adapter_factors(policy.peft, "policy"), name)
    sent = merge.merged(merge.names)
    assert all(torch.equal(sent[name], state[name]) for name in sent)
    assert merge.tally().expected().digests == {name: digest_of(state[name]) for name in sent}


def check_parts(policy: Policy, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """The trainer's merge in small parts is the whole one: values, shapes in advance, digests."""
    factors = adapter_factors(policy.peft, "policy")
    merge = HostMerge(policy.peft.get_base_model(), factors, str(dtype).removeprefix("torch."))
    parts, tally = merge.parts(limit_bytes=50_000), Tally()
    assert len(parts) > 3
    made = {}
    for names in parts:
        outline, merged = merge.outline(names), merge.merged(names, tally)
        assert {n: (t.shape, t.dtype) for n, t in outline.items()} == {
            n: (t.shape, t.dtype) for n, t in merged.items()
        }
        assert not made.keys() & merged.keys()
        made |= merged
    assert sorted(made) == fused_groups_of(made, state), "whole groups as an engine loads them"
    assert all(torch.equal(made[name], state[name]) for name in made)
    assert tally.expected() == merge.tally().expected()
    assert tally.expected().digests == {name: digest_of(state[name]) for name in made}


def test_merged_weights_are_taken_as_they_are_and_the_rest_from_the_base(policy: Policy) -> None:
    merger, base = merger_of(policy, torch.float32)
    payload = policy.payload(MERGED, 1)
    names = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    made = merger.merged(payload, names, merger.targets(payload))
    assert torch.equal(made[names[0]], policy.state()[names[0]])
    assert torch.equal(made[names[1]], base.tensor(names[1]))


def test_a_version_owes_nothing_to_the_one_before(policy: Policy) -> None:
    merger, _ = merger_of(policy, torch.bfloat16)
    payload = policy.payload(ADAPTER, 1)
    targets = merger.targets(payload)
    names = [name for of in targets.values() for name in of]
    first = merger.merged(payload, names, targets)
    policy.change(seed=2)
    merger.merged(policy.payload(ADAPTER, 2), names, targets)
    again = merger.merged(payload, names, targets)
    assert all(torch.equal(first[name], again[name]) for name in names)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_makes_the_same_version_and_leaves_torchs_as_they_were(
    policy: Policy, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger, _ = merger_of(policy, torch.float32)
    payload, before = policy.payload(ADAPTER, 1), torch.get_num_threads()
    targets = merger.targets(payload)
    names = [name for of in targets.values() for name in of]
    used = set()
    real = Digests.take
    monkeypatch.setattr(
        Digests, "take", lambda *args: (used.add((get_ident(), torch.get_num_threads())), real(*args))
    )
    torch.set_num_threads(threads)
    try:
        factors = adapter_factors(policy.peft, "policy")
        expected = HostMerge(policy.peft.get_base_model(), factors, "float32").tally().expected()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    made = merger.merged(payload, names, targets, threads)
    assert list(made) == names
    assert {name: digest_of(made[name]) for name in names} == expected.digests
    assert {of_torch for _, of_torch in used} == {1}, "threads that split a tensor wait for each other"
    assert (len(used) > 1) == (threads > 1)


def test_the_base_is_rounded_as_the_trainer_holds_it(policy: Policy) -> None:
    merger, base = merger_of(policy, torch.float32)
    factors = policy.payload(ADAPTER, 1).factors()
    payload = pack_adapter(1, "bfloat16", factors)
    name = "model.layers.0.self_attn.q_proj.weight"
    made = merger.merged(payload, [name], merger.targets(payload))[name]
    delta = policy.state()[name] - base.tensor(name)
    torch.testing.assert_close(made, base.tensor(name).bfloat16().float() + delta)


@pytest.mark.parametrize("kind", [ADAPTER, MERGED])
def test_what_came_over_nccl_is_merged_on_the_gpu_to_the_same_bits(policy: Policy, kind: str) -> None:
    """The base's tensors come from files, onto the CPU."""
    merger, base = merger_of(policy, torch.bfloat16)
    payload = policy.payload(kind, 1, torch.bfloat16)
    targets = merger.targets(payload)
    names = sorted(base.shapes)
    here, digests = merger.merged(payload, names, targets), Digests("sums")
    with second_device() as copied:
        there = merger.merged(payload.to(DEVICE), names, targets)
        assert {tensor.device for tensor in there.values()} == {DEVICE}
        for name, tensor in there.items():
            digests.take(name, tensor)
        assert digests.read() == {name: digest_of(tensor, "sums") for name, tensor in here.items()}
        assert copied == [16 * len(names)], "sums, and no tensor"


def test_a_trainer_on_a_gpu_packs_and_digests_what_one_on_a_cpu_does(policy: Policy) -> None:
    factors = adapter_factors(policy.peft, "policy")
    here = HostMerge(policy.peft.get_base_model(), factors, "bfloat16")
    there = HostMerge(policy.peft.get_base_model(), factors, "bfloat16")
    with second_device() as copied:
        there._base = {name: There(tensor) for name, tensor in here._base.items()}
        there._factors = {
            name: dataclasses.replace(f, a=There(f.a), b=There(f.b)) for name, f in factors.items()
        }
        expected = there.tally("sums").expected()
        assert copied == [8, 16 * len(expected.digests)], "how many weights have changed, and sums"
        assert expected == here.tally("sums").expected()
        pairs = [(pack_adapter(1, "bfloat16", f, "sums") for f in (there._factors, factors))]
        for names in here.parts(limit_bytes=50_000):
            merged = (merge.merged(names) for merge in (there, here))
            pairs.append(pack_merged(1, "bfloat16", tensors, algorithm="sums") for tensors in merged)
        copied.clear()
        for on_device, right in pairs:
            assert on_device.buffer.device == DEVICE
            assert on_device.digest == right.digest
        assert copied == [16] * len(pairs)
        assert len(pairs) > 4

"""The trainer's account of a version that is sent in parts; no engine needed."""

from __future__ import annotations

import types

import pytest
import torch

from actors.errors import RunFailure, UserError
from actors.models.lora.merge import adapter_factors
from actors.sync.digests import Algorithm, digest_of
from actors.sync.payload import Kind, Payload
from actors.sync.protocol import SentParts
from actors.trainer.weight_source import WeightSource
from tests.actors.rollout.vllm.vllm_cases import Policy, write_base

SMALL = 50_000


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    made = Policy(write_base(tmp_path_factory.mktemp("base"), "qwen3_moe"), "qwen3_moe")
    made.change(seed=1)
    return made


@pytest.fixture
def source(policy: Policy) -> WeightSource:
    host = types.SimpleNamespace(base=policy.peft.get_base_model(), model=policy.peft)
    return WeightSource(host)


def later(source: WeightSource) -> SentParts:
    sent = source.send_later([])
    assert sent is not None
    return sent


def test_what_fits_a_buffer_is_known_from_the_one_merge_that_packed_it(source: WeightSource) -> None:
    whole = source.prepare(1, "policy", "merged", "float32", 10**9)
    assert whole is not None
    assert whole.expected == source.expected("policy", "float32")
    assert (whole.offer.parts_later, whole.offer.bytes_later, source.send_later([])) == (0, 0, None)


def test_what_slots_have_to_hold_is_known_from_the_adapter_not_from_what_was_packed(
    source: WeightSource, policy: Policy
) -> None:
    prepared = source.prepare(1, "policy", "lora", "bfloat16")
    assert prepared is not None
    assert prepared.expected is not None
    factors = adapter_factors(policy.peft, "policy")
    assert prepared.offer.tensors == 2 * len(factors)
    right = {}
    for name, f in factors.items():
        right[f"{name} A"] = digest_of(f.a.bfloat16())
        right[f"{name} B"] = digest_of((f.b * f.scaling).bfloat16())
    assert prepared.expected.digests == right
    assert prepared.expected.share_unchanged_bf16 is None
    with pytest.raises(UserError, match=r"sync\.payload: lora needs LoRA"):
        source.prepare(2, None, "lora", "float32")


def test_parts_are_announced_before_they_are_merged_and_add_up_to_the_version(source: WeightSource) -> None:
    whole, parts = (source.prepare(1, "policy", "merged", "bfloat16", limit) for limit in (None, SMALL))
    assert whole is not None
    assert parts is not None
    assert parts.expected is None
    assert SMALL < parts.offer.bytes < parts.offer.bytes_later, "the experts of a layer stay together"
    assert parts.offer.tensors + parts.offer.tensors_later == whole.offer.tensors
    assert parts.offer.bytes + parts.offer.bytes_later >= whole.offer.bytes
    sent = later(source)
    assert len(sent.part_digests) == parts.offer.parts_later > 3
    assert sent.expected == whole.expected


def test_a_version_of_an_adapter_can_be_sent_again_though_the_policy_went_on(
    source: WeightSource, policy: Policy
) -> None:
    source.prepare(1, "policy", "merged", "float32", SMALL)
    first = later(source)
    policy.change(seed=2)
    again = later(source)
    assert again.part_digests == first.part_digests
    assert again.expected is None
    source.prepare(2, "policy", "merged", "float32", SMALL)
    assert later(source).part_digests != first.part_digests


def test_a_version_of_all_weights_that_is_gone_is_not_sent_as_another(
    source: WeightSource, policy: Policy
) -> None:
    prepared = source.prepare(1, None, "merged", "float32", SMALL)
    first = later(source)
    assert prepared is not None
    assert first.expected is not None
    assert first.expected.share_unchanged_bf16 is None
    assert later(source).part_digests == first.part_digests
    with torch.no_grad():
        policy.peft.get_base_model().get_parameter("model.layers.1.self_attn.k_norm.weight").add_(1e-3)
    with pytest.raises(RunFailure, match=r"(?s)version 1 can't be sent again.*packed_buffer_size_bytes"):
        source.send_later([0])


@pytest.mark.parametrize(("device", "algorithm"), [("cpu", "xxh3"), ("cuda", "sums")])
@pytest.mark.parametrize(("kind", "limit"), [("adapter", None), ("merged", None), ("merged", SMALL)])
def test_all_digests_of_a_version_are_by_what_trainer_and_engines_can_both_take(
    source: WeightSource, device: str, algorithm: Algorithm, kind: Kind, limit: int | None
) -> None:
    source._outlets._channels = {0: SentTo(), 1: SentTo()}  # type: ignore[dict-item]
    source._outlets.devices = {"cpu", device}
    prepared = source.prepare(1, "policy", kind, "float32", limit)
    source.send([0, 1])
    sent = source.send_later([0, 1])
    assert prepared is not None
    expected = prepared.expected if sent is None else sent.expected
    # Another engine in a place doesn't change what a version was digested by.
    source._outlets.devices = {"cpu"}
    asked = source.expected("policy", "float32")
    assert expected in (None, asked)
    assert asked is not None
    assert (prepared.offer.algorithm, asked.algorithm) == (algorithm, algorithm)
    assert {len(digest) for digest in asked.digests.values()} == {32}


class SentTo:
    """A channel's end."""

    def send(self, payload: Payload) -> None:
        self.sent = payload.manifest.algorithm

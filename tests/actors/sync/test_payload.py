"""Payloads: groups, manifests, bytes and digests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.models.lora.low_rank import Factors, low_rank_delta
from actors.sync.digests import digest_of
from actors.sync.payload import (
    ALIGNMENT,
    Manifest,
    fused_groups_of,
    group_of,
    pack_adapter,
    pack_merged,
)
from actors.sync.spec import SlotSpec
from tests.actors.pretend_device import DEVICE, second_device

QWEN = [
    f"model.layers.0.{name}"
    for name in (
        *(f"self_attn.{p}_proj.{leaf}" for p in "qkv" for leaf in ("weight", "bias")),
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        *(f"mlp.experts.{e}.{p}_proj.weight" for e in (0, 1) for p in ("gate", "up", "down")),
        "mlp.gate.weight",
        *(f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")),
    )
]


def factors() -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(0)
    plain = Factors(
        torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator), 2.0, False
    )
    stack = Factors(
        torch.randn(4, 2, 5, generator=generator), torch.randn(4, 3, 2, generator=generator), 0.5, True
    )
    return {"layer.q_proj.weight": plain, "layer.experts.down_proj": stack}


# --- Groups ---------------------------------------------------------------------------------------


def test_q_touched_takes_k_and_v_and_all_biases_along() -> None:
    together = fused_groups_of(["model.layers.0.self_attn.q_proj.weight"], QWEN)
    assert together == sorted(name for name in QWEN if name.split(".")[4] in ("q_proj", "k_proj", "v_proj"))
    assert len(together) == 6


def test_one_expert_takes_all_experts_of_its_layer_along_and_no_other() -> None:
    other = [name.replace("layers.0", "layers.1") for name in QWEN]
    together = fused_groups_of(["model.layers.0.mlp.experts.1.up_proj.weight"], QWEN + other)
    assert together == sorted(name for name in QWEN if ".experts." in name)


def test_a_slot_has_the_smallest_room_of_vllms_that_is_enough() -> None:
    rooms = [SlotSpec(rank, ()).max_lora_rank for rank in (1, 2, 8, 9, 300, 512, 513)]
    assert rooms == [1, 8, 8, 16, 320, 512, None]


def test_a_payload_for_slots_has_its_scaling_in_b_and_the_engines_dtype() -> None:
    b = torch.tensor([[1.0], [1.0035]])
    factors = {"layer.o_proj.weight": Factors(torch.full((1, 2), 0.1), b, 1.5, False)}
    scaled = {name: f.scaled(torch.bfloat16) for name, f in factors.items()}
    payload = pack_adapter(3, "float32", scaled, kind="lora")
    assert payload.manifest.payload == "lora"
    found = payload.factors()["layer.o_proj.weight"]
    assert (found.scaling, found.a.dtype, found.b.dtype) == (1.0, torch.bfloat16, torch.bfloat16)
    # Rounded once: 1.0035 in bfloat16 is 1.
    assert found.b.flatten().tolist() == [1.5, 1.5078125]
    assert Manifest.decode(payload.manifest.encode()) == payload.manifest


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("mlp.experts.gate_up_proj", "mlp.experts.down_proj_bias"), "mlp.experts"),
        (("mlp.experts.7.up_proj.weight", "mlp.experts.0.down_proj.weight"), "mlp.experts"),
        (("moe.experts.0.w1.weight", "moe.experts.3.w2.weight"), "moe.experts"),
        (("moe.input_linear.weight", "moe.output_linear.weight"), "moe.experts"),
        (("attn.q_a_proj.weight", "attn.kv_a_proj_with_mqa.weight"), "attn.fused_qkv_a_proj"),
        (("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.gate_up_proj.weight"), "mlp.gate_up_proj"),
        (("mlp.shared_experts.up_proj.weight",), "mlp.shared_experts.gate_up_proj"),
        (("mlp.gate.weight",), "mlp.gate"),
    ],
)  # fmt: skip
def test_groups_follow_what_engines_fuse(names: tuple[str, ...], group: str) -> None:
    assert {group_of(f"model.layers.3.{name}") for name in names} == {f"model.layers.3.{group}"}


# --- Bytes ----------------------------------------------------------------------------------------


def test_an_adapter_comes_out_of_its_buffer_as_it_went_in() -> None:
    sent = factors()
    payload = pack_adapter(7, "bfloat16", sent)
    got = payload.factors()
    assert got.keys() == sent.keys()
    for name, factor in sent.items():
        assert torch.equal(low_rank_delta(got[name]), low_rank_delta(factor))
        assert got[name].transposed == factor.transposed
    assert low_rank_delta(got["layer.experts.down_proj"]).shape == (4, 5, 3)
    assert (payload.manifest.version, payload.manifest.base_dtype) == (7, "bfloat16")
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in payload.tensors().values())


def test_merged_tensors_keep_their_dtype_and_values() -> None:
    sent = {"b.weight": torch.randn(3, 5).bfloat16(), "a.weight": torch.randn(7)}
    tensors = pack_merged(1, "float32", sent).tensors()
    assert all(torch.equal(tensors[name, "W"], tensor) for name, tensor in sent.items())
    assert tensors["b.weight", "W"].dtype == torch.bfloat16


def test_a_manifest_survives_its_bytes() -> None:
    manifest = pack_adapter(7, "float32", factors()).manifest
    again = Manifest.decode(manifest.encode())
    assert again == manifest
    assert again.digest == manifest.digest


def test_equal_weights_have_equal_bytes_whatever_their_order() -> None:
    one, other = (
        pack_adapter(1, "float32", factors()),
        pack_adapter(1, "float32", dict(reversed(factors().items()))),
    )
    assert (one.digest, one.manifest.digest) == (other.digest, other.manifest.digest)


def test_every_change_of_a_byte_a_name_or_a_version_changes_a_digest() -> None:
    payload = pack_adapter(1, "float32", factors())
    byte = payload.buffer.clone()
    byte[17] ^= 1
    assert digest_of(byte) != payload.digest
    assert pack_adapter(2, "float32", factors()).manifest.digest != payload.manifest.digest
    renamed = {name.replace("q_proj", "k_proj"): f for name, f in factors().items()}
    assert pack_adapter(1, "float32", renamed).manifest.digest != payload.manifest.digest


@pytest.mark.parametrize("pack", [pack_adapter, pack_merged])
def test_a_payload_is_digested_by_the_algorithm_that_its_manifest_names(pack: Any) -> None:
    weights = factors() if pack is pack_adapter else {"w": torch.arange(9.0)}
    xxh3, sums = (pack(1, "float32", weights, algorithm=algorithm) for algorithm in ("xxh3", "sums"))
    assert torch.equal(xxh3.buffer, sums.buffer)
    assert (xxh3.digest, sums.digest) == (digest_of(xxh3.buffer), digest_of(xxh3.buffer, "sums"))
    assert Manifest.decode(sums.manifest.encode()).algorithm == "sums"
    assert xxh3.manifest.digest != sums.manifest.digest


def test_the_digest_of_a_payload_on_a_device_takes_16_bytes_to_the_host() -> None:
    payload = pack_adapter(1, "float32", factors(), algorithm="sums")
    with second_device() as copied:
        there = payload.to(DEVICE)
        assert there.buffer.device == DEVICE
        assert there.to(DEVICE) is there
        assert there.digest == payload.digest
        assert copied == [16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_payload_is_the_same_on_a_card(dtype: torch.dtype) -> None:
    here = torch.randn(40, 72, generator=torch.Generator().manual_seed(0)).to(dtype)
    there, here = (pack_merged(0, "bfloat16", {"w": w}, algorithm="sums") for w in (here.cuda(), here))
    assert (there.digest, there.manifest) == (here.digest, here.manifest)

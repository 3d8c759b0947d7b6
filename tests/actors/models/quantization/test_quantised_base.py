"""A quantised base computes, trains and merges to the bit like its dequantised weights in files do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from actors.errors import InvariantViolation, UserError
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.base.loading import load_base
from actors.models.lora.adapters import adapter_parameters, attach_lora, frozen_digest
from actors.models.lora.merge import merged_state
from actors.models.quantization.layout import Rounding, quantised_places, quantised_sizes
from actors.models.quantization.quantised_tensor import (
    QuantisedTensor,
    held,
    plain,
    quantised_bytes,
    quantization_of,
)
from actors.models.spec import LoraSpec, ModelSpec
from tests.actors.models.tiny_models import architectures


def spec_of(base: Any, kind: str | None = "nf4", **more: Any) -> ModelSpec:
    return ModelSpec(base=str(base), quantization=kind, **more)


def trained(spec: ModelSpec, lora: LoraSpec, ids: torch.Tensor, shake: Any) -> tuple[Any, torch.Tensor]:
    """A model with an adapter whose gradients are those of one loss, and that loss's logits."""
    peft = attach_lora(load_base(spec), lora, "policy", seed=3)
    shake(peft, "policy")
    logits = peft(input_ids=ids).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return peft, logits.detach()


SUPPORTED = [case for case in architectures() if case.id != "dbrx"]


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_logits_gradients_and_merges_are_those_of_the_dequantised_weights(
    model_type, base_of, dequantised, groups_of, ids, randomise_b
):
    base, lora = base_of(model_type), LoraSpec(r=4, targets=groups_of(model_type))
    small, found = trained(spec_of(base), lora, ids, randomise_b)
    whole, expected = trained(spec_of(dequantised(base, "nf4"), None), lora, ids, randomise_b)
    # Dense layers of a mixture have PEFT's W + BA there, and the two products here.
    off = (
        1e-5
        if {"shared_experts", "mlp"} & ARCHITECTURES[model_type].parameters.keys() & {*lora.targets}
        else 0
    )
    torch.testing.assert_close(found, expected, rtol=off, atol=off)
    of_whole = adapter_parameters(whole, "policy")
    for name, parameter in adapter_parameters(small, "policy").items():
        torch.testing.assert_close(parameter.grad, of_whole[name].grad, rtol=10 * off, atol=10 * off)
    merged, wanted = merged_state(small, "policy"), merged_state(whole, "policy")
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_linear_layer_and_every_stack_of_experts_is_quantised(model_type, base_of):
    model = load_base(spec_of(base_of(model_type)))
    head = model.get_output_embeddings()
    left = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2
        and min(parameter.shape[-2:]) >= 32
        and not isinstance(parameter, QuantisedTensor)
    }
    names = ("embed", "lm_head", "bias", "conv1d")
    assert not [name for name in left if not any(word in name for word in names)], left
    assert head is None or not isinstance(head.weight, QuantisedTensor)
    small, weights, others = quantised_bytes(model)
    assert small <= 0.6 * weights
    sizes = quantised_sizes(model.config, "nf4", torch.float32)
    assert (sizes.weights_bytes, sizes.weights, sizes.others_bytes) == (small, weights, others)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_codecs_compute_in_both_dtypes(kind, dtype, base_of, dequantised, ids, randomise_b):
    base, lora = base_of("qwen3_moe"), LoraSpec(r=4)
    copy = dequantised(base, kind, getattr(torch, dtype))
    small, found = trained(spec_of(base, kind, dtype=dtype), lora, ids, randomise_b)
    _, expected = trained(
        spec_of(copy, None, dtype=dtype),
        lora.model_copy(update={"expert_impl": "unmerged"}),
        ids,
        randomise_b,
    )
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, expected)
    assert quantization_of(small) == kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dequantised_weight_is_kept_for_the_backward_pass(dtype, base_of, ids, randomise_b):
    peft = attach_lora(load_base(spec_of(base_of("qwen3_moe"), dtype=dtype)), LoraSpec(r=4), "policy")
    sizes = {tuple(p.shape) for p in peft.parameters() if isinstance(p, QuantisedTensor)}
    sizes |= {(*shape[:-2], shape[-1], shape[-2]) for shape in sizes}
    kept: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if (
            not isinstance(tensor, QuantisedTensor)
            and tuple(tensor.shape) in sizes
            and not tensor.requires_grad
        ):
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        peft(input_ids=ids[:1, :13]).logits.sum()
    assert kept == []


def test_files_know_which_of_their_tensors_are_quantised(base_of):
    config = load_base(spec_of(base_of("mixtral"), None)).config
    places = quantised_places(config, "nf4")
    experts = places["model.layers.0.mlp.experts.gate_up_proj"]
    assert len(experts.names) == 2 * config.num_local_experts
    assert all(name in BaseCheckpoint(base_of("mixtral")).shapes for name in experts.names)
    names = Rounding("nf4", config, torch.float32).names
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not [name for name in names if "embed" in name or "lm_head" in name or "gate.weight" in name]


def test_a_quantised_weight_moves_is_compared_and_is_never_changed(base_of):
    model = load_base(spec_of(base_of("qwen3_moe")))
    weight = model.model.layers[0].mlp.experts.down_proj
    assert isinstance(weight, QuantisedTensor)
    assert torch.equal(weight[3], plain(weight)[3])
    assert torch.equal(weight.transpose(-2, -1)[3], plain(weight)[3].t())
    assert all(map(torch.equal, held(weight.detach().clone()), held(weight)))
    assert torch.equal(weight.bfloat16(), plain(weight).bfloat16())
    before = frozen_digest(model)
    with pytest.raises(InvariantViolation, match="frozen"):
        weight.zero_()
    assert frozen_digest(model) == before
    weight.parts[0][0, 0] ^= 1
    assert frozen_digest(model) != before


def test_a_base_without_stacks_of_experts_and_a_split_one_are_refused(base_of):
    with pytest.raises(UserError, match=r"model\.quantization: the experts of a dbrx model are no stacks"):
        load_base(spec_of(base_of("dbrx")))
    with pytest.raises(UserError, match=r"model\.quantization: nf4 .* sharding: none"):
        load_base(spec_of(base_of("qwen3_moe")), mesh=object(), split="layers")
    with pytest.raises(UserError, match=r"leave out random_init"):
        load_base(spec_of(base_of("qwen3_moe"), random_init=True))


@pytest.mark.parametrize(
    ("lora", "moe"),
    [({"expert_impl": "peft"}, {}), ({}, {"experts_implementation": "eager"})],
    ids=["peft's W + BA", "a loop over experts"],
)
def test_lora_that_would_need_all_experts_dequantised_is_refused(lora, moe, base_of):
    model = load_base(spec_of(base_of("qwen3_moe"), moe=moe))
    with pytest.raises(UserError, match="quantised have unmerged LoRA only"):
        attach_lora(model, LoraSpec(r=4, **lora))


def test_a_linear_layer_with_a_bias_is_computed_from_its_quantised_weight():
    from actors.models.quantization.codec import codec_of, quantise
    from actors.models.quantization.quantised_tensor import quantised

    codec, layer = codec_of("int8"), nn.Linear(64, 48)
    layer.weight = quantised(quantise(codec, layer.weight.detach()[None]), codec, (48, 64), layer.weight)
    x = torch.randn(2, 5, 64, requires_grad=True)
    layer(x).sum().backward()
    expected = nn.functional.linear(x.detach(), plain(layer.weight), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(x.grad, plain(layer.weight).sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_it_computes_what_its_dequantised_weights_do(dtype, base_of, dequantised, ids, randomise_b):
    base, lora = base_of("qwen3_moe"), LoraSpec(r=4)
    copy = dequantised(base, "nf4", getattr(torch, dtype))
    found = []
    for spec in (spec_of(base, dtype=dtype), spec_of(copy, None, dtype=dtype)):
        peft = attach_lora(load_base(spec, "cuda"), lora, "policy", seed=3)
        randomise_b(peft, "policy")
        logits = peft(input_ids=ids.cuda()).logits
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        found.append((logits, [p.grad for p in adapter_parameters(peft, "policy").values()]))
    (small, small_grads), (whole, whole_grads) = found
    assert torch.equal(small, whole)
    assert all(map(torch.equal, small_grads, whole_grads))

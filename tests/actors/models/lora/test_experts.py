from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper

from actors.errors import UserError
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.base.loading import load_base
from actors.models.lora import adapters
from actors.models.moe import experts_forward
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from tests.actors.models.tiny_models import architectures

MOES = [t for t, row in ARCHITECTURES.items() if "experts" in row.parameters]


def loss_and_gradients(peft, ids):
    peft.zero_grad()
    loss = peft(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in peft.named_parameters() if p.requires_grad}


def both_ways(adapted, model_type, lora):
    return [
        adapted(model_type, lora.model_copy(update={"expert_impl": impl})) for impl in ("unmerged", "peft")
    ]


@pytest.mark.parametrize("model_type", architectures(MOES))
def test_unmerged_equals_peft_in_loss_and_gradient(model_type, adapted, groups_of, ids):
    expert_rank = "r/top_k" if model_type in ("qwen3_moe", "mixtral") else "r"
    lora = LoraSpec(r=6, targets=groups_of(model_type), expert_rank=expert_rank)
    ours, theirs = both_ways(adapted, model_type, lora)
    loss, gradients = loss_and_gradients(ours, ids)
    expected_loss, expected = loss_and_gradients(theirs, ids)
    assert torch.allclose(loss, expected_loss, rtol=0, atol=1e-6)
    assert gradients.keys() == expected.keys()
    assert all(g.abs().max() > 0 for g in gradients.values())
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-6), name


def test_it_really_runs_unmerged_and_materialises_nothing(adapted, ids, monkeypatch):
    ours, theirs = both_ways(adapted, "qwen3_moe", LoraSpec(r=4))

    def planted(self, adapter):
        raise AssertionError("materialised")

    monkeypatch.setattr(ParamWrapper, "get_delta_factors", planted)
    ours(input_ids=ids)
    with pytest.raises(AssertionError, match="materialised"):
        theirs(input_ids=ids)


def test_rslora_scaling_is_pefts(adapted, ids):
    ours, theirs = both_ways(adapted, "qwen3_moe", LoraSpec(r=4, use_rslora=True))
    with torch.no_grad():
        assert (ours(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max() < 1e-5


def test_with_the_adapter_off_it_is_the_base_and_a_fresh_adapter_to_the_bit(adapted, base_of, ids):
    spec = ModelSpec(base=str(base_of("qwen3_moe")))
    peft = adapters.attach_lora(load_base(spec), LoraSpec(r=4, expert_impl="unmerged"))
    base = load_base(spec)
    with torch.no_grad():
        fresh = peft(input_ids=ids).logits
        with adapters.role(peft, None):
            off = peft(input_ids=ids).logits
        assert (off - base(input_ids=ids).logits).abs().max() < 1e-6
    assert torch.equal(off, fresh)


def test_two_active_adapters_add_up_as_in_peft(adapted, ids, randomise_b):
    logits = []
    for peft in both_ways(adapted, "qwen3_moe", LoraSpec(r=4)):
        adapters.add_adapter(peft, "second", LoraSpec(r=4), seed=9)
        randomise_b(peft, "second", seed=4)
        peft.base_model.set_adapter(["policy", "second"])
        with torch.no_grad():
            logits.append(peft(input_ids=ids).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(adapted, ids):
    peft = adapted("qwen3_moe", LoraSpec(r=4, expert_impl="unmerged")).train()
    _, plain = loss_and_gradients(peft, ids)
    adapters.enable_gradient_checkpointing(peft)
    _, recomputed = loss_and_gradients(peft, ids)
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain)


def test_the_choice_is_by_dtype_and_can_be_forced(adapted):
    def runs(**lora):
        dtype = lora.pop("dtype", "float32")
        peft = adapted("qwen3_moe", LoraSpec(r=4, **lora), dtype=dtype)
        return peft.get_base_model().config._experts_implementation == experts_forward.UNMERGED

    assert runs()
    assert not runs(dtype="bfloat16")
    assert runs(dtype="bfloat16", expert_impl="unmerged")
    assert not runs(expert_impl="peft")
    assert not runs(targets=["attention"])


def test_unmerged_needs_the_grouped_product(base_of):
    spec = ModelSpec(base=str(base_of("qwen3_moe")), moe=MoeSpec(experts_implementation="eager"))
    with pytest.raises(UserError, match=r"needs moe.experts_implementation: grouped_mm, not 'eager'"):
        adapters.attach_lora(load_base(spec), LoraSpec(r=4, expert_impl="unmerged"))
    peft = adapters.attach_lora(load_base(spec), LoraSpec(r=4))
    assert peft.get_base_model().config._experts_implementation == "eager"


def test_a_deep_copy_computes_the_same(base_of, ids, randomise_b):
    spec = ModelSpec(base=str(base_of("qwen3_moe")))
    peft = adapters.attach_lora(load_base(spec), LoraSpec(r=4, expert_impl="unmerged"))
    randomise_b(peft, "policy")
    before = peft(input_ids=ids).logits
    again = copy.deepcopy(peft)
    assert torch.equal(again(input_ids=ids).logits, before)

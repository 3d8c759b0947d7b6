from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.errors import UserError
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.base.loading import load_base
from actors.models.moe.router_stats import RouterLoad, RouterStats, aux_loss, aux_loss_coef
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from tests.actors.models.tiny_models import SIZES, architectures

MOES = [t for t, row in ARCHITECTURES.items() if row.is_moe]
WITHOUT_AUX = ["deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "hunyuan_v1_moe"]
WITH_AUX = [m for m in MOES if m not in WITHOUT_AUX]
WITH_OUTPUT_LOGITS = [m for m in WITH_AUX if m != "granitemoe"]
DENSE_FIRST = ("qwen2_moe", "glm4_moe", "dots1", "deepseek_v2", "deepseek_v3", "ernie4_5_moe")
LAYERS = {m: 1 if m in DENSE_FIRST else 3 if m == "qwen3_next" else 2 for m in MOES}
"""With experts: the tiny models of some have a first layer without."""


@pytest.mark.parametrize("model_type", architectures(MOES))
def test_every_counted_token_chooses_top_k_experts_in_every_layer(model_type, base_of, ids):
    model = load_base(ModelSpec(base=str(base_of(model_type))))
    stats = RouterStats(model)
    with torch.no_grad(), stats.collecting():
        model(input_ids=ids)
    seen = stats.read()
    assert seen.tokens == ids.numel()
    assert seen.load.shape == (len(stats.layers), 8)
    assert (seen.load.sum(axis=1) == 2 * ids.numel()).all()
    assert (seen.entropy_sum > 0).all()
    assert (seen.entropy_sum <= ids.numel() * np.log(8) + 1e-6).all()
    assert len(stats.layers) == LAYERS[model_type]


def test_padding_is_not_counted(base_of, ids):
    model = load_base(ModelSpec(base=str(base_of("qwen3_moe"))))
    stats = RouterStats(model)
    padded = torch.cat([ids, torch.zeros(3, 6, dtype=ids.dtype)], dim=1)
    counted = torch.arange(26)[None].expand(3, -1) < 20
    with torch.no_grad(), stats.collecting():
        model(input_ids=ids)
    alone = stats.read()
    stats.reset()
    with torch.no_grad(), stats.collecting(counted):
        model(input_ids=padded, attention_mask=counted.long())
    together = stats.read()
    assert together.tokens == alone.tokens == 60
    assert (together.load == alone.load).all()
    assert together.entropy_sum == pytest.approx(alone.entropy_sum, rel=1e-5)


def test_a_token_that_stands_for_several_counts_as_often(base_of, ids):
    model = load_base(ModelSpec(base=str(base_of("qwen3_moe"))))
    stats = RouterStats(model)
    with torch.no_grad(), stats.collecting():
        model(input_ids=ids[[0, 1, 1, 1]])
    each = stats.read()
    stats.reset()
    with torch.no_grad(), stats.collecting(copies=torch.tensor([1] * 20 + [3] * 20)):
        model(input_ids=ids[[0, 1]])
    once = stats.read()
    assert once.tokens == each.tokens == 80
    assert (once.load == each.load).all()
    assert once.entropy_sum == pytest.approx(each.entropy_sum, rel=1e-5)


def test_nothing_is_counted_outside_and_micro_batches_add_up(adapted, ids):
    peft = adapted("qwen3_moe", LoraSpec(r=4, targets=["attention", "experts", "router"]))
    stats = RouterStats(peft)
    with torch.no_grad():
        peft(input_ids=ids)
        assert stats.read().tokens == 0
        with stats.collecting():
            for row in ids:
                peft(input_ids=row[None])
        parts = stats.read()
        stats.reset()
        with stats.collecting():
            peft(input_ids=ids)
        whole = stats.read()
    assert (parts.load == whole.load).all()
    assert stats.read(stats.totals() * 2).tokens == 120


def test_max_violation_dead_experts_and_entropy_of_a_known_load():
    seen = RouterLoad(np.array([[4, 4, 4, 4], [12, 4, 0, 0]]), np.array([10.0, 6.0]), tokens=8)
    assert seen.max_violation.tolist() == [0.0, 2.0]
    assert seen.metrics() == {
        "moe/maxvio": 1.0,
        "moe/maxvio_worst": 2.0,
        "moe/dead_experts": 2.0,
        "moe/entropy": 1.0,
    }
    assert RouterLoad(np.zeros((2, 4), dtype=np.int64), np.zeros(2), 0).metrics() == {}


def test_a_dense_model_has_no_routers(base_of, ids):
    model = load_base(ModelSpec(base=str(base_of("llama"))))
    stats = RouterStats(model)
    with torch.no_grad(), stats.collecting(keep_logits=True) as kept:
        model(input_ids=ids)
    assert stats.layers == []
    assert kept == []
    assert stats.read().metrics() == {}


def test_uniform_routing_has_the_auxiliary_loss_top_k():
    logits = torch.zeros(16, 8)
    assert float(aux_loss([logits, logits], top_k=2)) == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("model_type", architectures(WITH_OUTPUT_LOGITS))
def test_the_auxiliary_loss_is_transformers_own_also_with_padding(model_type, base_of, ids):
    model = load_base(ModelSpec(base=str(base_of(model_type))))
    stats = RouterStats(model)
    counted = torch.arange(20)[None] < torch.tensor([[20], [13], [7]])
    with torch.no_grad(), stats.collecting(counted, keep_logits=True) as kept:
        theirs = model(input_ids=ids, attention_mask=counted.long(), output_router_logits=True).aux_loss
    assert float(aux_loss(kept, stats.top_k)) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("model_type", architectures([m for m in WITH_AUX if m not in ("dbrx", "phimoe")]))
def test_the_auxiliary_loss_trains_the_router(model_type, adapted, ids):
    peft = adapted(model_type, LoraSpec(r=4, targets=["attention", "experts", "router"]))
    stats = RouterStats(peft)
    with stats.collecting(keep_logits=True) as kept:
        peft(input_ids=ids)
    aux_loss(kept, stats.top_k).backward()
    suffix = stats.router.module
    touched = [n for n, p in peft.named_parameters() if f".{suffix}." in n and "lora_" in n and p.grad.any()]
    assert len(touched) == 2 * len(stats.layers)


NOISE = {
    "phimoe": {"input_jitter_noise": 0.5},
    "minimax_m2": {"router_jitter_noise": 0.5},
    "mixtral": {"router_jitter_noise": 0.5},
    "dbrx": {"ffn_config": {**SIZES["dbrx"]["ffn_config"], "moe_jitter_eps": 0.5}},
}


@pytest.mark.parametrize(("model_type", "noise"), NOISE.items())
def test_training_routes_as_evaluation_does(model_type, noise, base_of, ids):
    base = base_of(model_type, **noise)
    model = load_base(ModelSpec(base=str(base)))
    noisy = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        evaluated = model(input_ids=ids).logits
        assert torch.equal(model.train()(input_ids=ids).logits, evaluated)
        assert not torch.equal(noisy.train()(input_ids=ids).logits, evaluated)


def test_the_weight_of_the_auxiliary_loss_follows_the_router(config_of):
    config = config_of("qwen3_moe", router_aux_loss_coef=0.003)

    def coef(model_type="qwen3_moe", asked=None, lora=None):
        spec = ModelSpec(base="x", lora=lora, moe=MoeSpec(router_aux_loss_coef=asked))
        return aux_loss_coef(spec, config if model_type == "qwen3_moe" else config_of(model_type))

    assert coef(lora=LoraSpec()) == 0
    assert coef(lora=LoraSpec(targets=["router"])) == 0.003
    assert coef(lora=None) == 0.003
    assert coef(asked=0.5, lora=None) == 0.5
    assert coef(asked=0.0, lora=None) == 0
    assert coef("llama") == coef("glm4_moe") == 0
    with pytest.raises(UserError, match="a llama model has no such loss"):
        coef("llama", asked=0.1)

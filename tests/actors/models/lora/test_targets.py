from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig

from actors.errors import UserError
from actors.models.architectures.lookup import ARCHITECTURES, REFUSED, architecture_of
from actors.models.base.loading import load_base
from actors.models.lora.targets import resolve_targets
from actors.models.spec import LoraSpec, ModelSpec
from tests.actors.models.tiny_models import architectures

EXPECTED = {
    "qwen3_moe": {
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "router": ("mlp.gate.weight",),
    },
    "qwen2_moe": {
        "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "router": ("mlp.gate.weight",),
        "shared_experts": (
            "mlp.shared_expert.gate_proj.weight",
            "mlp.shared_expert.up_proj.weight",
            "mlp.shared_expert.down_proj.weight",
        ),
        "mlp": ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    },
    "mixtral": {
        "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "router": ("mlp.gate.weight",),
    },
    "olmoe": {
        "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "router": ("mlp.gate.weight",),
    },
    "qwen3": {
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
    "llama": {
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
}


@pytest.mark.parametrize(("model_type", "groups"), EXPECTED.items())
def test_groups_resolve_to_the_names_of_the_architecture(model_type, groups, config_of):
    targets = resolve_targets(config_of(model_type), list(groups))
    assert {g.group: g.names for g in targets.groups} == groups


@pytest.mark.parametrize("model_type", architectures())
def test_counts_are_those_of_the_adapter_that_peft_makes(model_type, adapted, groups_of):
    lora = LoraSpec(r=4, targets=groups_of(model_type))
    peft = adapted(model_type, lora)
    targets = resolve_targets(peft.get_base_model(), lora.targets, lora)
    trainable = [p for p in peft.parameters() if p.requires_grad]
    assert targets.parameters == sum(p.numel() for p in trainable)
    assert 2 * sum(g.tensors for g in targets.groups) == len(trainable)
    assert targets.base_parameters == peft.get_base_model().num_parameters() - targets.parameters


def test_a_config_resolves_to_the_same_as_its_model(base_of, config_of):
    model = load_base(ModelSpec(base=str(base_of("qwen3_moe"))))
    assert resolve_targets(model, ["experts"]) == resolve_targets(config_of("qwen3_moe"), ["experts"])


@pytest.mark.parametrize(
    ("lora", "megabytes_bf16"),
    [
        (LoraSpec(r=16, targets=["attention"]), 26.7),
        (LoraSpec(r=32, targets=["attention"]), 53.5),
        (LoraSpec(r=16, targets=["experts"]), 1260),
        (LoraSpec(r=16, targets=["experts"], expert_rank="r/top_k"), 157),
        (LoraSpec(r=32, targets=["experts"], expert_rank="r/top_k"), 315),
    ],
)
def test_adapter_sizes_of_qwen3_30b_a3b(lora, megabytes_bf16):
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    )
    targets = resolve_targets(config, lora.targets, lora)
    assert targets.parameters * 2 / 1e6 == pytest.approx(megabytes_bf16, rel=0.01)
    assert targets.base_parameters == pytest.approx(30.53e9, rel=0.001)


def test_rank_by_top_k_is_a_pattern_for_the_experts_only(config_of):
    lora = LoraSpec(r=8, expert_rank="r/top_k")
    targets = resolve_targets(config_of("qwen3_moe"), lora.targets, lora)
    assert set(targets.rank_pattern.values()) == {4}
    assert len(targets.rank_pattern) == 2
    assert {g.group: g.rank for g in targets.groups} == {"attention": 8, "experts": 4}


def test_a_rank_that_top_k_does_not_divide_is_refused(config_of):
    lora = LoraSpec(r=5, expert_rank="r/top_k")
    with pytest.raises(UserError, match=r"model.lora.r: 5 is not a multiple of the base's 2 experts"):
        resolve_targets(config_of("mixtral"), lora.targets, lora)


def test_every_group_without_a_match_is_named_with_those_that_match(config_of):
    with pytest.raises(UserError) as caught:
        resolve_targets(config_of("llama"), ["attention", "experts", "router"])
    assert len(caught.value.problems) == 2
    assert "'experts' matches nothing in a llama model" in caught.value.problems[0]
    assert "groups with a match: attention, mlp" in caught.value.problems[1]


def test_a_config_that_makes_no_model_is_the_users_mistake(config_of):
    config = copy.deepcopy(config_of("mixtral"))
    config.hidden_act = "no-such-activation"
    with pytest.raises(UserError, match=r"makes no mixtral model of its config.json \(KeyError: .*no-such"):
        resolve_targets(config, ["attention"])


def test_an_mlp_group_needs_a_dense_layer(config_of):
    with pytest.raises(UserError, match="'mlp' matches nothing"):
        resolve_targets(config_of("qwen3_moe"), ["mlp"])


def test_the_table_for_users_has_counts_and_sizes(config_of):
    text = str(resolve_targets(config_of("qwen3_moe"), ["attention", "experts"]))
    assert "attention" in text
    assert "mlp.experts.gate_up_proj" in text
    assert "573.4 kB" in text


@pytest.mark.parametrize("model_type", ["jamba", "switch_transformers", "bloom"])
def test_an_unsupported_architecture_is_refused_with_the_reason(model_type):
    with pytest.raises(UserError, match=f"'{model_type}' is not supported: "):
        architecture_of(AutoConfig.for_model(model_type))


def test_no_architecture_is_both_supported_and_refused():
    assert not set(ARCHITECTURES) & set(REFUSED)


@pytest.mark.parametrize(
    "model_type", architectures([t for t, row in ARCHITECTURES.items() if row.packs == "bins"])
)
def test_packed_sequences_stay_apart_where_the_table_says_so(model_type, base_of, ids):
    model = load_base(ModelSpec(base=str(base_of(model_type))))
    first, second = ids[:1, :13], ids[1:2]
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(13), torch.arange(20)])[None]
    with torch.no_grad():
        together = model(input_ids=packed, position_ids=positions).logits.log_softmax(-1)
        alone = torch.cat([model(input_ids=s).logits.log_softmax(-1) for s in (first, second)], dim=1)
    assert (together - alone).abs().max() < 1e-5

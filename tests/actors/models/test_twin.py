from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from actors.models.architectures.lookup import architecture_of
from actors.models.base.loading import load_base
from actors.models.lora import adapters
from actors.models.moe import experts_forward
from actors.models.moe.router_stats import routers_of
from actors.models.spec import LoraSpec, ModelSpec
from actors.models.twin import write_adapter_twin, write_twin
from tests.actors.models.tiny_models import architectures

PUBLISHED = {
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000.0},
        "n_heads": 48,
        "d_model": 6144,
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 8, "topk_group": 3},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "glm4_moe": {"head_dim": 128, "use_qk_norm": True},
    "hunyuan_v1_moe": {"num_experts": 64, "moe_topk": [8] * 32, "head_dim": 128},
}
"""Sizes of models that people use, where the defaults of a config class are no working mixture of experts."""

ALL_EXPERTS = ("qwen2_moe", "qwen3_next", "dots1")
"""Their config classes have experts in every layer by default."""


@pytest.mark.parametrize("model_type", architectures())
def test_a_twin_is_a_small_model_of_the_same_class(model_type, tmp_path, groups_of):
    config = AutoConfig.for_model(model_type, **PUBLISHED.get(model_type, {}))
    twin = write_twin(config, tmp_path)
    model = load_base(ModelSpec(base=str(tmp_path)))
    assert type(model.config) is type(config)
    assert twin.parameters == model.num_parameters() < 2e6
    assert config.attribute_map.get("num_hidden_layers", "num_hidden_layers") in twin.changed
    assert not twin.tokenizer_copied
    router = architecture_of(config).router
    for module in routers_of(model, router.module).values() if router is not None else ():
        assert all(weight.any() for weight in module.parameters() if weight.ndim == 2 and len(weight) > 1)
    groups = [g for g in groups_of(model_type) if g != "mlp" or model_type not in ALL_EXPERTS]
    adapters.attach_lora(model, LoraSpec(targets=groups, expert_rank="r/top_k"))


def test_all_changed_keys_are_listed_with_both_values(tmp_path):
    config = AutoConfig.for_model("mixtral", num_local_experts=16)
    twin = write_twin(config, tmp_path)
    made = AutoConfig.from_pretrained(tmp_path).to_dict()
    before = config.to_dict()
    differs = {k for k in before if before[k] != made.get(k)} - {"dtype", "architectures", "_name_or_path"}
    assert differs == set(twin.changed)
    assert twin.changed["num_local_experts"] == (16, 8)


def test_the_base_tokenizer_comes_along(base_of, tmp_path):
    twin = write_twin(base_of("qwen3_moe"), tmp_path)
    assert twin.tokenizer_copied
    assert "vocab_size" not in twin.changed
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_the_same_seed_gives_the_same_twin(tmp_path):
    config = AutoConfig.for_model("qwen3_moe")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_twin(config, tmp_path / name, seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_an_adapter_has_a_twin_with_its_targets(adapted, base_of, tmp_path, ids):
    lora = LoraSpec(r=4, targets=["attention", "experts", "router"], expert_rank="r/top_k")
    adapters.save_adapter(adapted("qwen3_moe", lora), "policy", tmp_path / "adapter")
    write_twin(base_of("qwen3_moe"), tmp_path / "twin")
    write_adapter_twin(tmp_path / "adapter", tmp_path / "twin", tmp_path / "adapter-twin")
    base = load_base(ModelSpec(base=str(tmp_path / "twin"))).requires_grad_(False)
    experts_forward.use_fused(base)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        peft = adapters.attach_saved(base, tmp_path / "adapter-twin", "policy")
        assert torch.equal(peft(input_ids=ids).logits, expected)
    assert peft.peft_config["policy"].rank_pattern == {
        r"mlp\.experts\.gate_up_proj": 2,
        r"mlp\.experts\.down_proj": 2,
    }


def test_a_reward_model_has_a_twin_with_a_head_of_the_twins_width(adapted, base_of, tmp_path):
    lora = LoraSpec(r=4, targets=["attention", "experts"])
    head = torch.ones(1, 128)
    adapters.save_adapter(adapted("qwen3_moe", lora), "policy", tmp_path / "adapter", head)
    assert torch.equal(adapters.read_head(tmp_path / "adapter"), head)
    write_twin(base_of("qwen3_moe"), tmp_path / "twin")
    write_adapter_twin(tmp_path / "adapter", tmp_path / "twin", tmp_path / "adapter-twin")
    width = load_base(ModelSpec(base=str(tmp_path / "twin"))).config.hidden_size
    assert adapters.read_head(tmp_path / "adapter-twin").shape == (1, width)

"""Architectures without a row of the table, where the user allows them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.errors import UserError
from actors.models.architectures import lookup as architectures
from actors.models.architectures.derived import derived_row
from actors.models.architectures.lookup import ARCHITECTURES, allow_untested, architecture_of
from actors.models.base.loading import load_base, resolve_base
from actors.models.lora import adapters
from actors.models.lora.targets import resolve_targets
from actors.models.moe.router_stats import RouterStats
from actors.models.spec import LoraSpec, ModelSpec

SMALL = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def no_derived_rows_are_left() -> Iterator[None]:
    yield
    architectures._UNTESTED.clear()


def write(path, model_type, **sizes):
    config = AutoConfig.for_model(model_type, **SMALL, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen3_moe", "qwen2_moe", "mixtral", "granitemoe", "gpt_oss", "deepseek_v3", "hunyuan_v1_moe"],
)
def test_a_derived_row_finds_what_the_tested_one_names(
    model_type, config_of, groups_of, base_of, ids, monkeypatch
):
    groups = groups_of(model_type)
    expected = resolve_targets(config_of(model_type), groups)
    tested = ARCHITECTURES[model_type]
    row = derived_row(config_of(model_type))
    assert not row.tested
    assert row.packs == "no"
    assert row.attention == tested.attention
    assert row.top_k(config_of(model_type)) == tested.top_k(config_of(model_type))
    assert row.n_experts(config_of(model_type)) == tested.n_experts(config_of(model_type))
    monkeypatch.delitem(ARCHITECTURES, model_type)
    allow_untested(row)
    found = resolve_targets(config_of(model_type), groups)
    assert [(g.group, g.tensors, g.parameters) for g in found.groups] == [
        (g.group, g.tensors, g.parameters) for g in expected.groups
    ]


def test_the_routers_of_a_derived_row_are_counted(config_of, base_of, ids, monkeypatch):
    model = load_base(ModelSpec(base=str(base_of("qwen3_moe"))))

    def load():
        stats = RouterStats(model)
        with torch.no_grad(), stats.collecting():
            model(input_ids=ids)
        return stats.read().load

    expected = load()
    row = derived_row(config_of("qwen3_moe"))
    monkeypatch.delitem(ARCHITECTURES, "qwen3_moe")
    allow_untested(row)
    assert (load() == expected).all()


def test_an_unknown_architecture_runs_only_where_that_is_allowed(tmp_path, ids):
    base = write(tmp_path / "olmo2", "olmo2")
    (problem,) = resolve_base(ModelSpec(base=str(base))).problems
    assert "architecture 'olmo2' is not supported: it has no tested row" in problem
    assert "model.allow_untested: true" in problem
    model = load_base(ModelSpec(base=str(base), allow_untested=True))
    peft = adapters.attach_lora(model, LoraSpec(r=4, targets=["attention", "mlp"]))
    peft(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad.abs().max() for n, p in peft.named_parameters() if "lora_B" in n]
    assert len(gradients) == 14
    assert min(gradients) > 0
    with pytest.raises(UserError, match="groups with a match: attention, mlp"):
        resolve_targets(model.config, ["experts"])


def test_a_refused_architecture_stays_refused(tmp_path):
    config = AutoConfig.for_model("jamba")
    config.architectures = ["JambaForCausalLM"]
    config.save_pretrained(tmp_path)
    problems = resolve_base(ModelSpec(base=str(tmp_path), allow_untested=True, random_init=True)).problems
    assert len(problems) == 1
    assert "'jamba' is not supported: vLLM has no CPU kernel for its mamba layers" in problems[0]
    assert "work" in problems[0]
    with pytest.raises(UserError, match="jamba"):
        architecture_of(config)


def test_one_whose_parts_have_no_known_names_can_not_be_tried(tmp_path):
    config = AutoConfig.for_model("mamba", vocab_size=320, hidden_size=64, num_hidden_layers=1)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    (problem,) = resolve_base(ModelSpec(base=str(tmp_path), allow_untested=True, random_init=True)).problems
    assert "'mamba' is unknown and can't be tried: no linear layer of its attention was found" in problem

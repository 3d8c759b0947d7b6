from __future__ import annotations

import json
import resource
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from actors.errors import RunFailure, UserError
from actors.models import shards
from actors.models.base.loading import load_base
from actors.models.lora import adapters, merge, merge_check
from actors.models.spec import LoraSpec, ModelSpec
from tests.actors.models.tiny_models import architectures
from tests.architecture_results import record
from tests.peak_memory import peak_memory


@pytest.fixture
def saved(adapted, tmp_path):
    """A saved adapter of a tiny Qwen3-MoE."""
    adapters.save_adapter(adapted("qwen3_moe", LoraSpec(r=4)), "policy", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("model_type", architectures())
def test_a_merged_model_has_the_logits_of_base_and_adapter(model_type, adapted, groups_of, ids, tmp_path):
    tied = model_type in ("llama", "qwen2_moe")
    peft = adapted(model_type, LoraSpec(r=4, targets=groups_of(model_type)), tie_word_embeddings=tied)
    adapters.save_adapter(peft, "policy", tmp_path / "adapter")
    report = merge.merge_adapter(None, tmp_path / "adapter", tmp_path / "merged")
    # Linear attention carries the rounding of a merge along the row.
    tolerance = 1e-4 if model_type == "qwen3_next" else 1e-5
    assert report.max_logprob_diff < tolerance
    record(model_type, merge=report.max_logprob_diff)
    assert report.dtype == "float32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        merged, ours = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, peft))
    assert (merged - ours).abs().max() < tolerance


def test_the_merged_directory_is_complete_and_under_checkpoint_names(base_of, adapted, tmp_path):
    adapters.save_adapter(adapted("mixtral", LoraSpec(r=4)), "policy", tmp_path / "adapter")
    merge.merge_adapter(None, tmp_path / "adapter", tmp_path / "merged")
    base, merged = (load_file(d / "model.safetensors") for d in (base_of("mixtral"), tmp_path / "merged"))
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in base.items()}
    assert any("block_sparse_moe.experts.0.w1.weight" in name for name in merged)
    frozen = [n for n in base if "norm" in n or "embed" in n or "gate.weight" in n]
    assert all(torch.equal(base[n], merged[n]) for n in frozen)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]


def test_merging_touches_neither_base_nor_adapter(adapted, ids):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    before = (adapters.frozen_digest(peft), adapters.adapter_digest(peft, "policy"))
    first, second = (merge.merged_state(peft, "policy") for _ in range(2))
    assert (adapters.frozen_digest(peft), adapters.adapter_digest(peft, "policy")) == before
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_merging_without_an_adapter_is_the_checkpoint(adapted, base_of):
    state = merge.merged_state(adapted("qwen3_moe", LoraSpec(r=4)))
    checkpoint = load_file(base_of("qwen3_moe") / "model.safetensors")
    assert state.keys() == checkpoint.keys()
    assert all(torch.equal(state[n], checkpoint[n]) for n in state)


def test_what_rounding_to_bf16_loses_is_reported(adapted, tmp_path, randomise_b):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    shares, losses = {}, {}
    for std in (1e-6, 5e-2):
        randomise_b(peft, "policy", std=std)
        adapters.save_adapter(peft, "policy", tmp_path / f"adapter-{std}")
        out = tmp_path / f"merged-{std}"
        report = merge.merge_adapter(None, tmp_path / f"adapter-{std}", out, dtype="bfloat16")
        assert report.unchanged_share == report.unchanged_share_bf16
        shares[std] = report.unchanged_share_bf16
        losses[std] = report.mean_logprob_diff / report.adapter_effect
        assert report.median_logprob_diff < report.max_logprob_diff
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert 1 >= shares[1e-6] > 0.9
    assert shares[5e-2] < 0.1
    assert losses[1e-6] > 1 > losses[5e-2], "beside what the adapter does, rounding is much or little"


def test_a_bf16_base_is_merged_in_float32(base_of, adapted, tmp_path, saved):
    base = load_base(ModelSpec(base=str(base_of("qwen3_moe")), dtype="bfloat16"))
    merge.write_model(base, merge.merged_state(base), tmp_path / "bf16", base_of("qwen3_moe"))
    peft = adapters.attach_saved(base, saved, "policy")
    exact = merge.merged_state(peft, "policy", torch.float32)
    deltas = merge.adapter_deltas(peft, "policy")
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = peft.get_base_model().model.layers[0].self_attn.q_proj.weight
    assert torch.equal(exact[name], weight.float() + deltas[name])
    rounded = merge.merged_state(peft, "policy")[name]
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact[name].bfloat16())


def test_large_models_are_written_in_shards(adapted, base_of, tmp_path, monkeypatch, ids):
    monkeypatch.setattr(shards, "MAX_SHARD_SIZE", "500KB")
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    merge.write_model(peft, merge.merged_state(peft, "policy"), tmp_path, base_of("qwen3_moe"))
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = load_base(ModelSpec(base=str(tmp_path)))
    with torch.no_grad():
        assert (model(input_ids=ids).logits - peft(input_ids=ids).logits).abs().max() < 1e-4


def times(factor):
    """The adapter's factors, with another scaling than its own."""
    right = merge.adapter_factors
    return lambda *a: {n: replace(f, scaling=factor * f.scaling) for n, f in right(*a).items()}


def test_a_merge_that_went_wrong_is_an_error(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "adapter_factors", times(2))
    with pytest.raises(RunFailure, match="log-probabilities of the merged model differ by"):
        merge.merge_adapter(None, saved, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_that_rounding_alone_moves_far_is_merged_all_the_same(saved, tmp_path, monkeypatch):
    """What a trained base with unlikely tokens is: beyond the tolerance by its own rounding."""
    monkeypatch.setattr(merge_check, "ROUNDED_TOLERANCE", 0.0)
    assert merge.merge_adapter(None, saved, tmp_path / "merged", dtype="bfloat16").mean_logprob_diff > 0
    monkeypatch.setattr(merge, "adapter_factors", times(-20))
    with pytest.raises(RunFailure, match="log-probabilities of the merged model differ by"):
        merge.merge_adapter(None, saved, tmp_path / "wrong", dtype="bfloat16")


def test_a_directory_in_use_and_a_foreign_base_are_refused(saved, base_of, tmp_path):
    with pytest.raises(UserError, match="is not empty"):
        merge.merge_adapter(None, saved, saved)
    with pytest.raises(UserError, match=r"was trained on .*qwen3_moe.*, whose weights differ"):
        merge.merge_adapter(str(base_of("mixtral")), saved, tmp_path / "merged")
    with pytest.raises(UserError, match="dtype: 'int8'"):
        merge.merge_adapter(None, saved, tmp_path / "merged", dtype="int8")
    assert not (tmp_path / "merged").exists()


def test_an_empty_directory_is_filled_and_others_may_read_the_files(saved, tmp_path):
    (tmp_path / "merged").mkdir()
    report = merge.merge_adapter(None, saved, tmp_path / "merged")
    assert report.out_dir == str(tmp_path / "merged")
    files = [*(tmp_path / "merged").iterdir(), *saved.iterdir()]
    assert len({path.stat().st_mode for path in files}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_a_full_disk_while_a_model_is_written_is_said_and_leaves_nothing(saved, tmp_path):
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        with pytest.raises(RunFailure, match=r"cannot write .*: File too large"):
            merge.merge_adapter(None, saved, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "llama"])
def test_files_are_merged_into_what_a_loaded_model_is_merged_into(model_type, adapted, groups_of, tmp_path):
    peft = adapted(model_type, LoraSpec(r=4, targets=groups_of(model_type)))
    adapters.save_adapter(peft, "policy", tmp_path / "adapter")
    for dtype in (torch.float32, torch.bfloat16):
        merge.merge_adapter(None, tmp_path / "adapter", tmp_path / str(dtype), str(dtype)[6:], check=False)
        merged = load_file(tmp_path / str(dtype) / "model.safetensors")
        state = merge.merged_state(peft, "policy", dtype)
        assert merged.keys() == state.keys()
        assert all(torch.equal(merged[name], state[name]) for name in state)


def test_a_base_whose_files_have_other_names_is_merged_as_transformers_loads_it(tmp_path, ids):
    """An encoder saved alone has names without the prefix, and no head of its own."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).model.save_pretrained(tmp_path / "base")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    base = load_base(ModelSpec(base=str(tmp_path / "base")))
    peft = adapters.attach_lora(base, LoraSpec(r=2, targets=["attention"]), "policy")
    for name, parameter in adapters.adapter_parameters(peft, "policy").items():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    adapters.save_adapter(peft, "policy", tmp_path / "adapter")
    report = merge.merge_adapter(None, tmp_path / "adapter", tmp_path / "merged")
    assert report.merged_weights == 8
    assert 0 < report.max_logprob_diff < 1e-5 < report.adapter_effect
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        assert torch.allclose(merged, peft(input_ids=ids).logits, atol=1e-5)


def test_a_merge_and_its_check_take_less_than_the_base(base_of, tmp_path):
    """Of memory that is no cache of files, in a process of its own; some 100 MiB don't grow with the base."""
    config = Qwen3MoeConfig.from_pretrained(base_of("qwen3_moe"))
    config.update({"hidden_size": 256, "num_hidden_layers": 24, "num_experts": 32, "vocab_size": 512})
    config.update({"moe_intermediate_size": 256, "head_dim": 32, "dtype": "bfloat16"})
    model = Qwen3MoeForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "base")
    peft = adapters.attach_lora(model, LoraSpec(r=2), "policy")
    adapters.save_adapter(peft, "policy", tmp_path / "adapter")
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    assert size > 250 * 2**20
    peak = peak_memory(
        "import peft, transformers.models.qwen3_moe.modeling_qwen3_moe\nfrom actors.models.lora import merge",
        "merge.merge_adapter(*sys.argv[1:4])",
        *(tmp_path / name for name in ("base", "adapter", "merged")),
    )
    assert peak < 1.1 * size, peak / size

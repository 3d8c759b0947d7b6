from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.errors import UserError
from actors.models.base.loading import load_base, load_tokenizer, resolve_base
from actors.models.lora import adapters
from actors.models.spec import LoraSpec, ModelSpec
from tests.peak_memory import peak_memory


def problems_of(base, **settings):
    return resolve_base(ModelSpec(base=str(base), **settings)).problems


@pytest.fixture
def base(base_of, tmp_path):
    """A copy of a tiny Qwen3-MoE that a test may damage."""
    return shutil.copytree(base_of("qwen3_moe"), tmp_path / "base")


def rewrite(base, **changes):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_base_loads_in_evaluation_mode_without_cache_and_router_logits(base):
    rewrite(base, output_router_logits=True)
    model = load_base(ModelSpec(base=str(base)))
    assert not model.training
    assert model.config.use_cache is False
    assert model.config.output_router_logits is False
    assert model.config._experts_implementation == "grouped_mm"
    assert model.dtype == torch.float32
    assert load_base(ModelSpec(base=str(base), dtype="bfloat16")).dtype == torch.bfloat16


def mapped(file):
    """(first, last) addresses of this process at which a file is mapped."""
    lines = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))
    ]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


def test_weights_that_need_no_change_stay_the_mapped_file_which_nobody_writes(base_of, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_of("llama"), base)
    file = base / "model.safetensors"
    before = file.read_bytes()
    model = load_base(ModelSpec(base=str(base)))
    places = mapped(file.resolve())
    for name, parameter in model.named_parameters():
        assert any(first <= parameter.data_ptr() < last for first, last in places), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before
    other = load_base(ModelSpec(base=str(base), dtype="bfloat16"))
    assert not any(
        first <= p.data_ptr() < last for first, last in mapped(file.resolve()) for p in other.parameters()
    )


def test_a_base_of_another_dtype_lies_in_memory_once_while_it_is_loaded(base_of, tmp_path):
    """Of many experts, pieces of which transformers' threads would make faster than they are put together."""
    config = Qwen3MoeConfig.from_pretrained(base_of("qwen3_moe"))
    config.update({"hidden_size": 256, "num_hidden_layers": 12, "num_experts": 32, "vocab_size": 512})
    config.update({"moe_intermediate_size": 256, "head_dim": 32, "dtype": "bfloat16"})
    with torch.random.fork_rng():
        Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    in_float32 = 2 * (tmp_path / "model.safetensors").stat().st_size
    assert in_float32 > 250 * 2**20
    peak = peak_memory(
        "import transformers.models.qwen3_moe.modeling_qwen3_moe\n"
        "import torch.distributed.fsdp, transformers.distributed.sharding_utils\n"
        "from actors.models.base.loading import load_base\nfrom actors.models.spec import ModelSpec",
        "model = load_base(ModelSpec(base=sys.argv[1], dtype='float32'))",
        tmp_path,
    )
    assert peak < 1.5 * in_float32, peak / in_float32


def test_random_weights_come_from_the_seed_and_need_no_weight_file(base):
    (base / "model.safetensors").unlink()
    spec = ModelSpec(base=str(base), random_init=True)
    digests = [adapters.frozen_digest(load_base(spec, seed=s).requires_grad_(False)) for s in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert problems_of(base)[0].endswith("(or set model.random_init: true)")


def test_an_adapter_directory_stands_for_its_base(adapted, base_of, tmp_path):
    adapters.save_adapter(adapted("qwen3_moe", LoraSpec(r=4)), "policy", tmp_path)
    resolved = resolve_base(ModelSpec(base=str(tmp_path)))
    assert resolved.problems == []
    assert resolved.base_path == str(base_of("qwen3_moe"))
    assert resolved.adapter_path == str(tmp_path)
    assert load_base(ModelSpec(base=str(tmp_path))).config.model_type == "qwen3_moe"
    assert load_tokenizer(ModelSpec(base=str(tmp_path))).chat_template


def test_an_adapter_whose_base_is_gone_is_named(adapted, tmp_path):
    adapters.save_adapter(adapted("qwen3_moe", LoraSpec(r=4)), "policy", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for named, message in (
        ("/nowhere/base", "directory '/nowhere/base' does not exist"),
        (None, "does not name its base"),
    ):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": named})
        )
        assert message in problems_of(tmp_path)[0]
    (tmp_path / "adapter_config.json").write_text("{")
    assert "can't be read" in problems_of(tmp_path)[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no-such-dir", "directory './no-such-dir' does not exist"),
        ("no-such-dir", "directory 'no-such-dir' does not exist"),
        ("some-org/no-such-model", "could not be had from the hub"),
    ],
)
def test_a_base_that_cannot_be_found_is_the_users_mistake(name, message):
    assert message in problems_of(name)[0]
    with pytest.raises(UserError, match=message):
        load_base(ModelSpec(base=name))


def test_a_directory_without_a_model_and_a_file_are_named(tmp_path, base):
    assert "holds neither config.json nor adapter_config.json" in problems_of(tmp_path)[0]
    assert "is a file" in problems_of(base / "config.json")[0]


def test_a_base_that_is_no_causal_lm_is_refused(base):
    rewrite(base, architectures=["Qwen3MoeForSequenceClassification"])
    assert problems_of(base) == [
        f"model.base: '{base}' is no causal language model (Qwen3MoeForSequenceClassification)"
    ]
    (base / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    assert "is no causal language model (ViTModel)" in problems_of(base)[0]


def test_damage_is_named_by_file(base):
    (base / "config.json").write_text("{ not json")
    assert f"{base}/config.json" in problems_of(base)[0]
    (base / "config.json").write_text(json.dumps({"model_type": "made_up_type"}))
    assert "is not understood" in problems_of(base)[0]


def test_only_safetensors_are_opened(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert "'pytorch_model.bin' is a pickle and isn't opened" in problems_of(base)[0]


def test_a_missing_shard_is_named(base):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00001-of-00002.safetensors, model-00002" in problems_of(base)[0]


def test_a_truncated_weight_file_is_the_users_mistake(base):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="did not load"):
        load_base(ModelSpec(base=str(base)))


def test_quantised_bases_and_unknown_architectures_are_all_listed(base):
    rewrite(base, quantization_config={"quant_method": "fp8"})
    assert "is quantised" in problems_of(base)[0]
    rewrite(base, model_type="jamba", architectures=["JambaForCausalLM"], num_experts=8)
    found = problems_of(base)
    assert any("'jamba' is not supported" in p for p in found)
    assert any("is quantised" in p for p in found)


def test_code_from_a_hub_is_not_run(base):
    rewrite(base, model_type="their_own", auto_map={"AutoConfig": "code.Config"})
    (base / "code.py").write_text("raise SystemExit('ran')")
    assert "trust_remote_code" in problems_of(base)[0]


def test_a_tokenizer_without_pad_token_gets_one(base):
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(ModelSpec(base=str(base)))
    assert tokenizer.pad_token_id is not None
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(ModelSpec(base=str(base)))

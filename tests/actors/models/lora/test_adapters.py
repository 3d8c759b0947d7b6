from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from actors.errors import UserError
from actors.models.base.digests import base_fingerprint
from actors.models.base.loading import load_base
from actors.models.lora import adapters
from actors.models.moe import experts_forward
from actors.models.spec import LoraSpec, ModelSpec
from tests.actors.models.tiny_models import architectures
from tests.architecture_results import record


def logits_of(model, ids, role=None):
    with torch.no_grad(), adapters.role(model, role):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("model_type", architectures())
def test_a_saved_adapter_loads_in_plain_peft_with_the_same_logits(
    model_type, adapted, base_of, groups_of, ids, tmp_path
):
    expert_rank = "r/top_k" if model_type in ("qwen3_moe", "granitemoe") else "r"
    peft = adapted(model_type, LoraSpec(r=4, targets=groups_of(model_type), expert_rank=expert_rank))
    adapters.save_adapter(peft, "policy", tmp_path)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_of(model_type), dtype=torch.float32), tmp_path
    )
    with torch.no_grad():
        theirs = plain(input_ids=ids).logits.log_softmax(-1)
    ours = logits_of(peft, ids, "policy").log_softmax(-1)
    difference = float((theirs - ours).abs().max())
    assert difference < 1e-6 * max(1.0, float(ours.abs().max()))
    record(model_type, reload=difference)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_saved_adapter_comes_back_bit_for_bit(adapted, base_of, ids, tmp_path):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    adapters.save_adapter(peft, "policy", tmp_path)
    again = adapters.attach_saved(load_base(ModelSpec(base=str(base_of("qwen3_moe")))), tmp_path, "other")
    assert adapters.adapter_digest(again, "other") == adapters.adapter_digest(peft, "policy")
    assert torch.equal(logits_of(again, ids, "other"), logits_of(peft, ids, "policy"))


def test_saving_twice_gives_the_same_bytes(adapted, tmp_path):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    for name in ("a", "b"):
        adapters.save_adapter(peft, "policy", tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_only_the_named_adapter_is_saved(adapted, tmp_path):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    adapters.add_adapter(peft, "reference", LoraSpec(r=4), seed=8)
    adapters.save_adapter(peft, "reference", tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(adapters.adapter_parameters(peft, "reference"))
    assert not any("policy" in name for name in saved)


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_global_generator(base_of):
    spec = ModelSpec(base=str(base_of("qwen3_moe")))
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    digests = [
        adapters.adapter_digest(adapters.attach_lora(load_base(spec), LoraSpec(r=4), seed=s), "policy")
        for s in (1, 1, 2)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.rand(1), expected)


def test_a_role_switches_the_adapter_and_comes_back_after_an_error(adapted, base_of, ids, randomise_b):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    adapters.add_adapter(peft, "second", LoraSpec(r=4), seed=2)
    randomise_b(peft, "second", seed=7)
    policy, second, off = (logits_of(peft, ids, role) for role in ("policy", "second", None))
    assert not torch.equal(policy, second)
    base = load_base(ModelSpec(base=str(base_of("qwen3_moe"))))
    experts_forward.use_fused(base.requires_grad_(False))
    assert torch.equal(off, logits_of(base, ids))
    with pytest.raises(RuntimeError), adapters.role(peft, "second"):
        raise RuntimeError
    with torch.no_grad():
        assert torch.equal(peft(input_ids=ids).logits, policy)


def test_an_unknown_role_is_never_the_bare_base(adapted, base_of):
    peft = adapted("qwen3", LoraSpec(targets=["attention"]))
    with (
        pytest.raises(KeyError, match="no adapter 'reference'"),
        adapters.role(peft, "reference"),
    ):
        pass
    plain = load_base(ModelSpec(base=str(base_of("qwen3"))))
    with pytest.raises(KeyError, match="there are: none"), adapters.role(plain, "policy"):
        pass


def test_two_roles_before_one_backward_give_the_gradients_of_two(adapted, ids, randomise_b):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    adapters.add_adapter(peft, "critic", LoraSpec(r=4), seed=2, trainable=True)
    randomise_b(peft, "critic")

    def loss(name):
        with adapters.role(peft, name):
            return peft(input_ids=ids).logits.square().mean()

    def gradients(*steps):
        peft.zero_grad()
        for step in steps:
            step().backward()
        return {n: p.grad.clone() for n, p in peft.named_parameters() if p.requires_grad}

    apart = gradients(lambda: loss("policy"), lambda: loss("critic"))
    joint = gradients(lambda: loss("policy") + loss("critic"))
    assert any(".critic." in n for n in apart)
    assert any(".policy." in n for n in apart)
    assert all(torch.allclose(apart[n], joint[n], atol=1e-7) for n in apart)


def test_gradient_checkpointing_recomputes_with_the_role_of_the_forward(adapted, ids, randomise_b):
    peft = adapted("qwen3_moe", LoraSpec(r=4)).train()
    adapters.add_adapter(peft, "critic", LoraSpec(r=4), seed=2, trainable=True)
    randomise_b(peft, "critic")

    def gradients():
        peft.zero_grad()
        with adapters.role(peft, "critic"):
            loss = peft(input_ids=ids).logits.square().mean()
        loss.backward()  # outside: the policy is active here
        return {n: p.grad for n, p in peft.named_parameters() if p.grad is not None and p.grad.any()}

    plain = gradients()
    adapters.enable_gradient_checkpointing(peft)
    recomputed = gradients()
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain)


def test_adding_an_adapter_changes_nothing_of_the_others(adapted, ids):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    trainable = {n for n, p in peft.named_parameters() if p.requires_grad}
    before = logits_of(peft, ids, "policy")
    adapters.add_adapter(peft, "reference", LoraSpec(r=8))
    assert {n for n, p in peft.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(logits_of(peft, ids, "policy"), before)
    adapters.set_trainable(peft, ["reference"])
    trained = [n for n, p in peft.named_parameters() if p.requires_grad]
    assert trained
    assert all(".reference." in n for n in trained)


def test_copied_weights_make_two_roles_equal(adapted, ids):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    adapters.add_adapter(peft, "reference", LoraSpec(r=4), seed=5)
    adapters.copy_adapter_weights(peft, "policy", "reference")
    assert torch.equal(logits_of(peft, ids, "policy"), logits_of(peft, ids, "reference"))
    adapters.add_adapter(peft, "wide", LoraSpec(r=8))
    with pytest.raises(ValueError, match="differ in targets or ranks"):
        adapters.copy_adapter_weights(peft, "policy", "wide")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama"])
def test_training_moves_the_adapter_and_never_a_frozen_tensor(model_type, adapted, groups_of, ids):
    peft = adapted(model_type, LoraSpec(r=4, targets=groups_of(model_type))).train()
    frozen, trained = adapters.frozen_digest(peft), adapters.adapter_digest(peft, "policy")
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapters.frozen_digest(peft) == frozen
    assert adapters.adapter_digest(peft, "policy") != trained


@pytest.mark.parametrize("max_bytes", [2**40, 0])
def test_the_frozen_digest_sees_a_moved_tensor_also_when_sampled(max_bytes, adapted):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    before = adapters.frozen_digest(peft, max_bytes)
    with torch.no_grad():
        peft.get_base_model().model.norm.weight.mul_(1.0001)
    assert adapters.frozen_digest(peft, max_bytes) != before


def test_an_adapter_fits_its_own_base(adapted, base_of, config_of, tmp_path):
    base = base_of("qwen3_moe")
    adapters.save_adapter(adapted("qwen3_moe", LoraSpec(r=4, expert_rank="r/top_k")), "policy", tmp_path)
    assert adapters.check_adapter_matches_base(tmp_path, config_of("qwen3_moe"), base) == []


def test_an_adapter_of_another_size_or_architecture_is_refused(adapted, config_of, tmp_path):
    adapters.save_adapter(adapted("qwen3_moe", LoraSpec(r=4)), "policy", tmp_path)
    wider = adapters.check_adapter_matches_base(tmp_path, config_of("qwen3_moe", num_experts=16))
    assert len(wider) == 1
    assert "is of another base" in wider[0]
    dense = adapters.check_adapter_matches_base(tmp_path, config_of("qwen3"))
    assert len(dense) == 1
    assert "is of another base" in dense[0]


def test_an_adapter_of_other_weights_of_the_same_size_is_refused(adapted, base_of, config_of, tmp_path):
    adapters.save_adapter(adapted("qwen3_moe", LoraSpec(r=4)), "policy", tmp_path)
    other = base_of("qwen3_moe", seed=77)
    problems = adapters.check_adapter_matches_base(tmp_path, config_of("qwen3_moe"), other)
    assert len(problems) == 1
    assert "whose weights differ from" in problems[0]


def test_a_base_has_the_fingerprint_of_its_copy(base_of, tmp_path):
    base = base_of("qwen3_moe")
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert base_fingerprint(tmp_path) == base_fingerprint(base) != base_fingerprint(base_of("mixtral"))
    assert base_fingerprint(tmp_path / "nothing") is None


def test_damaged_and_foreign_adapters_are_user_errors(adapted, tmp_path):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    adapters.save_adapter(peft, "policy", tmp_path)
    adapters.add_adapter(peft, "wide", LoraSpec(r=8))
    with pytest.raises(UserError, match="of another base or other LoRA settings"):
        adapters.load_adapter_weights(peft, "wide", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="is damaged"):
        adapters.load_adapter_weights(peft, "policy", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        adapters.add_adapter(peft, "broken", tmp_path)


def test_adapters_on_one_base_must_share_their_expert_targets(adapted):
    peft = adapted("qwen3_moe", LoraSpec(r=4))
    with pytest.raises(UserError, match="same experts and router targets"):
        adapters.add_adapter(peft, "router", LoraSpec(r=4, targets=["attention", "router"]))
    adapters.add_adapter(peft, "attention", LoraSpec(r=4, targets=["attention"]))


def test_dropout_on_experts_is_refused(base_of):
    model = load_base(ModelSpec(base=str(base_of("qwen3_moe"))))
    with pytest.raises(UserError, match=r"model.lora.lora_dropout: 0.1 can't be applied"):
        adapters.attach_lora(model, LoraSpec(lora_dropout=0.1))


def test_the_saved_config_names_the_base_and_the_targets_in_order(adapted, base_of, tmp_path):
    adapters.save_adapter(adapted("qwen3_moe", LoraSpec(r=4)), "policy", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_of("qwen3_moe"))
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]

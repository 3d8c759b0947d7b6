"""ModelHost on one rank: layout does not change the result, resume is exact, planted faults are found."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.algorithms.dpo import DpoLoss
from actors.algorithms.sft import SftLoss
from actors.errors import InvariantViolation, UserError
from actors.models.lora.adapters import adapter_digest
from actors.models.spec import LoraSpec
from actors.trainer import kept_state
from actors.trainer.model_host import ModelHost
from actors.trainer.optimizer import make_scheduler
from actors.trainer.spec import OptimSpec
from tests.actors.trainer.host_cases import (
    host_spec,
    pair_batch,
    policy_host,
    random_pairs,
    random_rows,
    sft_batch,
    with_reference,
)

OPTIM = OptimSpec(learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=2)
ROWS = random_rows(48)
PAIRS = random_pairs(32)


def batch_at(step: int) -> Any:
    return sft_batch(ROWS[8 * step : 8 * step + 8])


def sft_curve(host: ModelHost, steps: int = 4, first: int = 0) -> list[float]:
    return [host.updates.update(batch_at(step), SftLoss(), step)["loss"] for step in range(first, steps)]


def trained(base: Path, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Curve and final adapter of four SFT steps."""
    host = policy_host(base, **settings)
    host.updates.prepare_training("policy", OPTIM, 4)
    losses = sft_curve(host)
    return losses, {n: p.detach().clone() for n, p in host.updates.training.parameters.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": False},
        {"max_tokens_per_micro_batch": 60},
        {"max_tokens_per_micro_batch": 60, "packing": False},
    ],
)
def test_packing_and_micro_batches_do_not_change_the_curve(settings: dict[str, Any], tiny_base: Path) -> None:
    losses, weights = trained(tiny_base)
    other_losses, other_weights = trained(tiny_base, **settings)
    assert other_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("aux", [0.0, 0.05])
def test_gradient_checkpointing_does_not_change_the_curve(tiny_base: Path, aux: float) -> None:
    losses, weights = trained(tiny_base, aux=aux)
    spec = host_spec(tiny_base, aux=aux)
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"gradient_checkpointing": True})})
    host = ModelHost(spec)
    host.add_adapter("policy")
    host.updates.prepare_training("policy", OPTIM, 4)
    assert sft_curve(host) == pytest.approx(losses, rel=1e-6)
    load = host.updates.router_load()
    assert load is not None
    assert (load.sum(axis=1) == 2 * batch_at(3).n_tokens).all(), "recomputing counts nothing"
    for name, weight in weights.items():
        torch.testing.assert_close(
            host.updates.training.parameters[name].detach(), weight, rtol=1e-4, atol=1e-6
        )


def test_a_loss_over_the_whole_batch_is_the_same_in_micro_batches(tiny_base: Path) -> None:
    curves = []
    for budget in (8192, 100):
        host = policy_host(tiny_base, max_tokens_per_micro_batch=budget)
        host.updates.prepare_training("policy", OPTIM, 4)
        steps = [with_reference(host, pair_batch(PAIRS[8 * s : 8 * s + 8])) for s in range(4)]
        curves.append(
            [host.updates.update(b, DpoLoss(loss_type="aot"), s)["loss"] for s, b in enumerate(steps)]
        )
        evaluated = host.updates.evaluate(steps[0], DpoLoss(loss_type="aot"), "policy")["loss"]
        curves[-1].append(evaluated)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_with_the_adapter_off_log_probabilities_are_the_bare_base_bit_for_bit(tiny_base: Path) -> None:
    bare = ModelHost(host_spec(tiny_base, lora=None))
    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 4)
    sft_curve(host, 2)
    batch = batch_at(0)
    assert np.array_equal(host.scores.token_logprobs(batch, None), bare.scores.token_logprobs(batch, None))
    assert not np.array_equal(
        host.scores.token_logprobs(batch, "policy"), host.scores.token_logprobs(batch, None)
    )


def test_log_probabilities_equal_the_models_own_logits(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    batch = batch_at(0)
    ours = host.scores.logprobs(batch, "policy")
    for sequence, (prompt, answer) in enumerate(ROWS[:8]):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_p = host.state.base(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        assert ours[sequence] == pytest.approx(log_p[len(prompt) - 1 :].sum().item(), rel=1e-6)


def test_an_architecture_that_scales_its_logits_is_scored_with_the_scaling(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GraniteMoeConfig

    config = GraniteMoeConfig(
        vocab_size=320, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, logits_scaling=3.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    host = ModelHost(host_spec(tmp_path, lora=None, aux=None))
    ids = torch.tensor([ROWS[0][0] + ROWS[0][1]])
    batch = sft_batch([([ids[0, 0].item()], ids[0, 1:].tolist())])
    with torch.no_grad():
        expected = host.state.base(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
    np.testing.assert_allclose(host.scores.token_logprobs(batch, None), expected, rtol=1e-5)


def test_a_reference_that_equals_the_policy_gives_ln_2_and_rewards_of_exactly_zero(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 4)
    sft_curve(host, 3)
    host.copy_adapter("policy", "reference")
    host.updates.prepare_training("policy", OPTIM, 4)
    batch = with_reference(host, pair_batch(PAIRS[:8]), "reference")
    metrics = host.updates.update(batch, DpoLoss(), 0)
    DpoLoss().check_start(metrics, tolerance=1e-6)
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == metrics["rewards/accuracies"] == 0
    wrong = with_reference(host, pair_batch(PAIRS[:8]), None)
    with pytest.raises(InvariantViolation, match="not what the policy started from"):
        DpoLoss().check_start(host.updates.evaluate(wrong, DpoLoss(), "policy"), tolerance=1e-4)


def test_training_moves_only_the_adapter_in_training(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 4)
    sft_curve(host, 2)
    host.copy_adapter("policy", "reference")
    host.updates.prepare_training("policy", OPTIM, 4)
    frozen, reference = host.frozen_digest(), adapter_digest(host.state.model, "reference")
    before = adapter_digest(host.state.model, "policy")
    sft_curve(host, 2)
    assert host.frozen_digest() == frozen
    assert adapter_digest(host.state.model, "reference") == reference
    assert adapter_digest(host.state.model, "policy") != before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resuming_from_a_checkpoint_is_exact_to_the_bit(
    dropout: float, tiny_base: Path, tmp_path: Path
) -> None:
    lora = LoraSpec(r=4, targets=["attention"] if dropout else ["attention", "experts"], lora_dropout=dropout)
    straight = policy_host(tiny_base, lora=lora)
    straight.updates.prepare_training("policy", OPTIM, 6)
    losses = sft_curve(straight, 3)
    straight.saving.save_checkpoint(tmp_path / "checkpoint")
    losses += sft_curve(straight, 6, first=3)

    resumed = policy_host(tiny_base, lora=lora, seed=0)
    resumed.updates.prepare_training("policy", OPTIM, 6)
    assert resumed.saving.load_checkpoint(tmp_path / "checkpoint") == 3
    assert sft_curve(resumed, 6, first=3) == losses[3:]
    assert adapter_digest(resumed.state.model, "policy") == adapter_digest(straight.state.model, "policy")
    if dropout:
        without = policy_host(tiny_base, lora=lora.model_copy(update={"lora_dropout": 0.0}))
        without.updates.prepare_training("policy", OPTIM, 6)
        assert sft_curve(without, 6) != losses


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_fresh_host_goes_on_from_what_another_one_handed_over_to_the_bit(
    optim: Any, tiny_base: Path
) -> None:
    settings = OPTIM.model_copy(update={"optim": optim, "lr_scheduler_type": "cosine", "warmup_steps": 2})
    lost, fresh = policy_host(tiny_base), policy_host(tiny_base, seed=1)
    for host in (lost, fresh):
        host.updates.prepare_training("policy", settings, 6)
    sft_curve(lost, 3)
    facts, state = lost.kept.take(whole=True)
    assert facts.kept
    fresh.kept.put(pickle.loads(pickle.dumps(state)))
    assert sft_curve(fresh, 6, first=3) == sft_curve(lost, 6, first=3)
    assert adapter_digest(fresh.state.model, "policy") == adapter_digest(lost.state.model, "policy")
    assert (fresh.updates.router_load() == lost.updates.router_load()).all()


def test_a_state_that_is_too_large_for_the_memory_that_is_free_is_not_kept(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = policy_host(tiny_base)
    monkeypatch.setattr(kept_state, "SHARE_OF_MEMORY", 1e-12)
    facts, state = host.kept.take(whole=True)
    assert (facts.kept, state) == (False, None)


def test_a_checkpoint_that_is_written_while_a_step_is_worked_on_is_that_of_the_step_before(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 6)
    sft_curve(host, 2)
    host.saving.save_checkpoint(tmp_path / "before")
    training, within, go_on = host.updates.training, threading.Event(), threading.Event()
    reduce = training.reduce_gradients

    def held() -> None:
        within.set()
        assert go_on.wait(60)
        reduce()

    monkeypatch.setattr(training, "reduce_gradients", held)
    step = threading.Thread(target=host.updates.update, args=(batch_at(2), SftLoss(), 2))
    step.start()
    assert within.wait(60)
    assert host.saving.save_before(tmp_path / "aside", 2)
    assert not host.saving.save_before(tmp_path / "wrong", 3)
    go_on.set()
    step.join(60)
    assert not host.saving.save_before(tmp_path / "wrong", 2), "it was applied meanwhile"
    for name in ("parameters.safetensors", "optimizer.safetensors", "state.json"):
        assert (tmp_path / "aside" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "inverse_sqrt"])
def test_a_longer_training_goes_on_from_a_shorter_one_to_the_bit(
    schedule: str, tiny_base: Path, tmp_path: Path
) -> None:
    optim = OPTIM.model_copy(update={"lr_scheduler_type": schedule})
    assert not optim.needs_length
    straight, short, longer = (policy_host(tiny_base) for _ in range(3))
    straight.updates.prepare_training("policy", optim, 5)
    losses = sft_curve(straight, 5)
    short.updates.prepare_training("policy", optim, 3)
    sft_curve(short, 3)
    short.saving.save_checkpoint(tmp_path / "checkpoint")
    longer.updates.prepare_training("policy", optim, 5)
    assert longer.saving.load_checkpoint(tmp_path / "checkpoint") == 3
    assert sft_curve(longer, 5, first=3) == losses[3:]
    assert adapter_digest(longer.state.model, "policy") == adapter_digest(straight.state.model, "policy")


@pytest.mark.parametrize(
    ("settings", "needed_by"),
    [
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type: linear"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1},
            "warmup_steps: 0.1, a share of all steps",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.1}, ""),
        ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 5}, ""),
    ],
)
def test_a_schedule_says_by_which_setting_it_depends_on_the_number_of_steps(
    settings: dict[str, Any], needed_by: str
) -> None:
    """Compared with transformers' own schedule over two lengths."""
    spec = OptimSpec(learning_rate=1.0, **settings)
    assert spec.needs_length == needed_by
    rates: list[list[float]] = []
    for total in (20, 40):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make_scheduler(optimizer, spec, total)
        rates.append([])
        for _ in range(20):
            rates[-1].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    assert (rates[0] != rates[1]) == bool(needed_by)


def test_an_unusable_checkpoint_is_named_and_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 6)
    sft_curve(host, 2)
    directory = tmp_path / "checkpoint-2"
    host.saving.save_checkpoint(directory)
    sft_curve(host, 3, first=2)
    now = adapter_digest(host.state.model, "policy")

    whole = (directory / "optimizer.safetensors").read_bytes()
    (directory / "optimizer.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"checkpoint-2.*can't be read"):
        host.saving.load_checkpoint(directory)
    (directory / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"optimizer\.safetensors missing"):
        host.saving.load_checkpoint(directory)
    (directory / "optimizer.safetensors").write_bytes(whole)
    state = json.loads((directory / "state.json").read_text())
    (directory / "state.json").write_text(json.dumps({**state, "total_steps": 7}))
    with pytest.raises(UserError, match="other settings: total_steps"):
        host.saving.load_checkpoint(directory)
    (directory / "state.json").write_text(json.dumps(state))
    other = policy_host(tiny_base, lora=LoraSpec(r=2))
    other.updates.prepare_training("policy", OPTIM, 6)
    with pytest.raises(UserError, match="other parameters"):
        other.saving.load_checkpoint(directory)
    assert adapter_digest(host.state.model, "policy") == now


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 4)
    sft_curve(host, 1)
    before = adapter_digest(host.state.model, "policy")
    with torch.no_grad():
        norm = host.state.base.model.norm.weight
        norm.fill_(float("nan"))
    with pytest.raises(InvariantViolation, match=r"update of step 1.*loss = nan and grad_norm = nan"):
        host.updates.update(batch_at(1), SftLoss(), 1)
    assert adapter_digest(host.state.model, "policy") == before


def test_parameters_without_a_gradient_are_listed(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 4)
    layer = host.state.base.model.layers[1].self_attn
    layer.o_proj.forward = lambda x: layer.o_proj.base_layer(x)  # the planted fault: its adapter is not used
    with pytest.raises(InvariantViolation) as caught:
        host.updates.update(batch_at(0), SftLoss(), 0)
    assert "layers.1.self_attn.o_proj.lora_B" in caught.value.reason
    assert caught.value.reason.startswith("1 trainable"), "A waits for B"


def test_the_router_trains_with_the_auxiliary_loss(tiny_base: Path) -> None:
    lora = LoraSpec(r=4, targets=["attention", "experts", "router"])
    curves = {}
    for aux in (0.0, 0.05):
        host = policy_host(tiny_base, lora=lora, aux=aux)
        host.updates.prepare_training("policy", OPTIM, 4)
        curves[aux] = [host.updates.update(batch_at(step), SftLoss(), step) for step in range(4)]
    first = curves[0.05][0]
    assert first["aux_loss"] == pytest.approx(2.0, rel=0.2), "uniform routing gives top_k"
    assert first["loss"] == pytest.approx(curves[0.0][0]["loss"] + 0.05 * first["aux_loss"], rel=1e-6)
    assert first["moe/entropy"] <= np.log(8) + 1e-6
    assert {"moe/maxvio", "moe/dead_experts"} <= first.keys()


def test_a_base_without_lora_trains_whole_and_is_saved_in_transformers_layout(
    tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    host = ModelHost(host_spec(tiny_base, lora=None))
    host.updates.prepare_training(None, OPTIM, 4)
    losses = sft_curve(host)
    assert losses[-1] < losses[0]
    host.saving.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert loaded.config.use_cache
    for (name, ours), (_, theirs) in zip(
        host.state.base.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert (tmp_path / "model" / "tokenizer_config.json").is_file()
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1, "others may read all"


def test_a_base_that_is_an_adapter_directory_is_that_adapter(tiny_base: Path, tmp_path: Path) -> None:
    first = policy_host(tiny_base)
    first.updates.prepare_training("policy", OPTIM, 4)
    sft_curve(first, 3)
    first.saving.save_adapter("policy", tmp_path / "adapter")
    second = ModelHost(host_spec(tmp_path / "adapter"))
    second.add_adapter("policy")
    expected = first.scores.token_logprobs(batch_at(0), "policy")
    assert np.array_equal(second.scores.token_logprobs(batch_at(0), None), expected)
    assert np.array_equal(second.scores.token_logprobs(batch_at(0), "policy"), expected)


def test_a_batch_without_the_reference_is_refused(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 4)
    with pytest.raises(KeyError, match="ref_chosen_logps"):
        host.updates.update(pair_batch(PAIRS[:4]), DpoLoss(), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("packing", ["auto", False])
def test_updates_on_a_card_are_those_of_the_cpu(packing: str | bool, tiny_base: Path) -> None:
    losses, parameters = trained(tiny_base, device="cuda", packing=packing)
    right_losses, right = trained(tiny_base, packing=packing)
    assert losses == pytest.approx(right_losses, rel=1e-4)
    # Adam turns a gradient near 0 into a whole step, in whichever direction rounding gives it.
    apart = {n: (p.cpu() - right[n]).norm() / right[n].norm() for n, p in parameters.items()}
    assert max(apart.values()) < 0.02

"""Scalar heads: values and scores of a host, their layout on disk, and training together with an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.algorithms.loss import Loss, MetricSums, TokenView, Totals
from actors.algorithms.reward import RewardLoss
from actors.algorithms.sft import SftLoss
from actors.algorithms.value import ValueLoss
from actors.batches.batch import Batch
from actors.errors import InvariantViolation, UserError
from actors.models.lora import adapters
from actors.models.lora.merge import merge_adapter
from actors.models.spec import LoraSpec
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import OptimSpec
from tests.actors.trainer.host_cases import (
    host_spec,
    pair_batch,
    policy_host,
    random_pairs,
    random_rows,
    sft_batch,
)

OPTIM = OptimSpec(learning_rate=2e-3, lr_scheduler_type="constant")
ROWS, PAIRS = random_rows(24), random_pairs(24)


def value_batch(rows: list[tuple[list[int], list[int]]], seed: int = 0) -> Batch:
    """Rows with random returns for every counted token."""
    batch = sft_batch(rows)
    returns = np.random.default_rng(seed).normal(size=int(batch.loss_mask.sum()))
    return batch.with_token_columns(returns=returns, old_values=np.zeros_like(returns))


def reward_host(base: Path | str, steps: int = 3, **settings: Any) -> ModelHost:
    """A reward model after a few steps, so that adapter and head both do something."""
    host = ModelHost(host_spec(base, **settings))
    host.add_adapter("reward")
    host.add_head("reward", "normal")
    host.updates.prepare_training("reward", OPTIM, 10)
    for step in range(steps):
        host.updates.update(pair_batch(PAIRS[4 * step : 4 * step + 4]), RewardLoss(), step)
    return host


def hidden_states(host: ModelHost, role: str, ids: list[int]) -> torch.Tensor:
    """(tokens, hidden) of one sequence by itself, in the model's own way."""
    with torch.no_grad(), adapters.role(host.state.model, role):
        return host.state.base.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("settings", [{}, {"packing": False}, {"max_tokens_per_micro_batch": 60}])
def test_values_and_scores_are_the_head_on_the_trunks_states(
    settings: dict[str, Any], tiny_base: Path
) -> None:
    host = reward_host(tiny_base, **settings)
    weight = host.state.heads["reward"].weight[0]
    batch = pair_batch(PAIRS[:5])
    values, scores = [], []
    for pair in PAIRS[:5]:
        for answer in (pair["chosen_ids"], pair["rejected_ids"]):
            states = hidden_states(host, "reward", pair["prompt_ids"] + answer) @ weight
            values.append(states[len(pair["prompt_ids"]) - 1 : -1])
            scores.append(states[-1].item())
    np.testing.assert_allclose(
        host.scores.values(batch, "reward"), torch.cat(values).detach(), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(host.scores.scores(batch, "reward"), scores, rtol=1e-5, atol=1e-6)


def test_no_logits_are_made_for_a_head(tiny_base: Path) -> None:
    host = reward_host(tiny_base, steps=0)

    def refuse(*_: Any) -> None:
        raise AssertionError("the output head ran")

    host.state.base.get_output_embeddings().register_forward_hook(refuse)
    host.scores.scores(pair_batch(PAIRS[:2]), "reward")
    host.updates.update(pair_batch(PAIRS[:2]), RewardLoss(), 0)
    with pytest.raises(AssertionError, match="output head ran"):
        host.scores.logprobs(pair_batch(PAIRS[:2]), "reward")


def test_a_saved_reward_model_is_a_sequence_classifier_of_plain_transformers_and_peft(
    tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    host = reward_host(tiny_base)
    host.saving.save_adapter("reward", tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "reward").eval()
    sequences = [pair["prompt_ids"] + pair["chosen_ids"] for pair in PAIRS[:6]]
    longest = max(map(len, sequences))
    pad = model.config.pad_token_id
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences]),
            attention_mask=torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in sequences]),
        ).logits[:, 0]
    ours = host.scores.scores(pair_batch(PAIRS[:6]), "reward")[0::2]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert np.abs(ours).max() > 0.01


def test_a_saved_reward_model_comes_back_to_the_bit(tiny_base: Path, tmp_path: Path) -> None:
    host = reward_host(tiny_base)
    batch = pair_batch(PAIRS[:6])
    host.saving.save_adapter("reward", tmp_path / "reward")
    host.copy_adapter("reward", "critic")
    other = policy_host(tiny_base)
    other.add_adapter("again", tmp_path / "reward", trainable=False)
    expected = host.scores.scores(batch, "reward")
    assert np.array_equal(other.scores.scores(batch, "again"), expected)
    assert np.array_equal(host.scores.scores(batch, "critic"), expected), "a copy brings the head along"
    other.add_head("again", "zero")
    assert np.array_equal(other.scores.scores(batch, "again"), expected), "a head that is there is kept"
    with pytest.raises(KeyError, match="'policy' has no head"):
        other.scores.scores(batch, "policy")


def test_a_fresh_head_is_zero_or_as_transformers_draws_it(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    host.add_head("policy", "zero")
    assert not host.scores.scores(pair_batch(PAIRS[:2]), "policy").any()
    host.add_adapter("drawn")
    host.add_head("drawn", "normal")
    weight = host.state.heads["drawn"].weight
    assert weight.std().item() == pytest.approx(host.state.config.initializer_range, rel=0.2)
    twin = reward_host(tiny_base, steps=0)
    assert torch.equal(twin.state.heads["reward"].weight, weight), "ranks draw the same head from the seed"
    with pytest.raises(KeyError, match="no adapter 'absent'"):
        host.add_head("absent")


@pytest.mark.parametrize("architecture", ["olmoe", "granitemoe"])
def test_where_transformers_has_no_classifier_the_head_is_a_file_beside_a_plain_adapter(
    architecture: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
        "eos_token_id": 2,
    }  # fmt: skip
    experts = "num_experts" if architecture == "olmoe" else "num_local_experts"
    config = AutoConfig.for_model(architecture, **sizes, **{experts: 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    host = reward_host(tmp_path / "base", aux=None)
    host.saving.save_adapter("reward", tmp_path / "reward")
    head = load_file(tmp_path / "reward" / "score_head.safetensors")["score.weight"]
    assert torch.equal(head, host.state.heads["reward"].weight.detach())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    PeftModel.from_pretrained(plain, tmp_path / "reward")
    batch = pair_batch(PAIRS[:4])
    other = ModelHost(host_spec(tmp_path / "base", aux=None))
    other.add_adapter("again", tmp_path / "reward")
    assert np.array_equal(other.scores.scores(batch, "again"), host.scores.scores(batch, "reward"))


def test_a_reward_model_is_not_merged_without_its_head(tiny_base: Path, tmp_path: Path) -> None:
    reward_host(tiny_base, steps=1).saving.save_adapter("reward", tmp_path / "reward")
    with pytest.raises(UserError, match="would lose its head"):
        merge_adapter(None, tmp_path / "reward", tmp_path / "merged")


def test_everything_below_a_head_of_zeros_waits_for_it_and_no_longer(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    host.add_head("policy", "zero")
    host.updates.prepare_training("policy", OPTIM, 10)
    for step in range(3):
        host.updates.update(value_batch(ROWS[8 * step : 8 * step + 8], step), ValueLoss(), step)
    assert not host.updates.training.check.missing()
    assert all(p.grad is not None and p.grad.any() for p in host.updates.training.parameters.values())

    host = policy_host(tiny_base)
    host.add_head("policy", "normal")
    host.updates.prepare_training("policy", OPTIM, 10)
    layer = host.state.base.model.layers[0].self_attn
    layer.q_proj.forward = lambda x: layer.q_proj.base_layer(x)  # the planted fault: its adapter is not used
    with pytest.raises(InvariantViolation, match=r"layers\.0\.self_attn\.q_proj\.lora_B"):
        host.updates.update(value_batch(ROWS[:8]), ValueLoss(), 0)


def test_a_step_without_any_gradient_is_right_only_where_a_loss_says_so(tiny_base: Path) -> None:
    class Nothing(Loss):
        def totals(self, batch: Batch) -> Totals:
            return {}

        def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
            return 0.0 * view.logps.sum(), {}

    class Vanishing(Nothing):
        gradient_may_vanish: ClassVar[bool] = True

    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 10)
    host.updates.update(sft_batch(ROWS[:4]), Vanishing(), 0)
    with pytest.raises(InvariantViolation, match="got no gradient"):
        host.updates.update(sft_batch(ROWS[:4]), Nothing(), 1)
    # The auxiliary loss reaches everything but the last layer's experts.
    lora = LoraSpec(r=4, targets=["attention", "experts", "router"])
    host = policy_host(tiny_base, lora=lora, aux=0.02)
    host.updates.prepare_training("policy", OPTIM, 10)
    assert host.updates.update(sft_batch(ROWS[:4]), Vanishing(), 0)["grad_norm"] > 0
    with pytest.raises(InvariantViolation, match=r"2 trainable parameters got no gradient: .*\.experts\."):
        host.updates.update(sft_batch(ROWS[:4]), Nothing(), 1)
    # Nor a scalar head: values and returns that are all zero.
    host = policy_host(tiny_base, lora=lora, aux=0.02)
    host.add_head("policy", "zero")
    host.updates.prepare_training("policy", OPTIM, 10)
    assert host.updates.update(sft_batch(ROWS[:4]), Vanishing(), 0)["grad_norm"] > 0
    # Where the loss may vanish only those may be without: not the last layer's attention.
    host = policy_host(tiny_base, lora=lora, aux=0.02)
    host.updates.prepare_training("policy", OPTIM, 10)
    layer = host.state.base.model.layers[-1].self_attn
    layer.q_proj.forward = lambda x: layer.q_proj.base_layer(x)
    with pytest.raises(InvariantViolation, match=r"layers\.\d\.self_attn\.q_proj\.lora_B"):
        host.updates.update(sft_batch(ROWS[:4]), Vanishing(), 0)


def test_a_temperature_divides_the_logits_of_updates_and_log_probabilities(tiny_base: Path) -> None:
    class Cool(SftLoss):
        @property
        def logit_temperature(self) -> float:
            return 0.7

    host = policy_host(tiny_base)
    batch = sft_batch(ROWS[:4])
    cool = host.scores.token_logprobs(batch, "policy", 0.7)
    assert host.updates.evaluate(batch, Cool(), "policy")["loss"] == pytest.approx(-cool.mean(), rel=1e-6)
    prompt, answer = ROWS[0]
    with torch.no_grad():
        logits = host.state.base(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    np.testing.assert_allclose(cool[: len(answer)], expected, rtol=1e-5, atol=1e-6)


def test_a_loss_of_scores_on_a_role_without_a_head_is_refused(tiny_base: Path) -> None:
    host = policy_host(tiny_base)
    host.updates.prepare_training("policy", OPTIM, 4)
    with pytest.raises(KeyError, match="RewardLoss reads scores, and this role has no head"):
        host.updates.update(pair_batch(PAIRS[:4]), RewardLoss(), 0)


def test_a_router_that_trains_gets_its_auxiliary_loss_in_a_reward_model_too(tiny_base: Path) -> None:
    lora = LoraSpec(r=4, targets=["attention", "experts", "router"])
    first = {}
    for aux in (0.0, 0.05):
        host = ModelHost(host_spec(tiny_base, lora=lora, aux=aux))
        host.add_adapter("reward")
        host.add_head("reward", "normal")
        host.updates.prepare_training("reward", OPTIM, 4)
        first[aux] = host.updates.update(pair_batch(PAIRS[:4]), RewardLoss(), 0)
    assert first[0.05]["aux_loss"] == pytest.approx(2.0, rel=0.2), "uniform routing gives top_k"
    expected = first[0.0]["loss"] + 0.05 * first[0.05]["aux_loss"]
    assert first[0.05]["loss"] == pytest.approx(expected, rel=1e-6)


class Extremes(Loss):
    """Reports the extremes of log-probabilities over the batch."""

    reads: ClassVar[Literal["logps", "values", "scores"]] = "logps"

    def totals(self, batch: Batch) -> Totals:
        return {}

    def __call__(self, view: TokenView, totals: Totals) -> tuple[torch.Tensor, MetricSums]:
        from actors.algorithms.loss import largest, smallest

        return view.logps.sum(), {"low": smallest(view.logps), "high": largest(view.logps)}


def test_extremes_are_those_of_all_micro_batches(tiny_base: Path) -> None:
    host = policy_host(tiny_base, max_tokens_per_micro_batch=50)
    batch = sft_batch(ROWS[:8])
    found = host.updates.evaluate(batch, Extremes(), "policy")
    logps = host.scores.token_logprobs(batch, "policy")
    assert (found["low"], found["high"]) == (pytest.approx(logps.min()), pytest.approx(logps.max()))

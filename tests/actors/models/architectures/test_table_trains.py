"""Every architecture of the table trains through a host: LoRA on all that it has, nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from actors.algorithms.reward import RewardLoss
from actors.algorithms.sft import SftLoss
from actors.batches.batch import Batch
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.lora.adapters import adapter_parameters
from actors.models.lora.heads import has_sequence_classifier
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec, TargetGroup
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import HostSpec, OptimSpec
from tests.actors.models.tiny_models import architectures

GENERATOR = np.random.default_rng(3)
SEQUENCES = [GENERATOR.integers(3, 300, size=n).tolist() for n in (9, 17, 30, 21, 12, 26)]
BATCH = Batch.from_sequences(SEQUENCES, [[False] * 3 + [True] * (len(s) - 3) for s in SEQUENCES], 1)
OPTIM = OptimSpec(learning_rate=5e-3, lr_scheduler_type="constant")


def host_of(base: Path, groups: list[TargetGroup], **settings: object) -> ModelHost:
    moe = MoeSpec(router_aux_loss_coef=0)
    model = ModelSpec(base=str(base), lora=LoraSpec(r=4, targets=groups), moe=moe)
    host = ModelHost(HostSpec.model_validate({"model": model, **settings}))
    host.add_adapter("policy")
    return host


@pytest.mark.parametrize("model_type", architectures())
def test_three_steps_move_every_adapter_and_nothing_else(
    model_type: str, base_of: Callable[..., Path], groups_of: Callable[[str], list[TargetGroup]]
) -> None:
    host = host_of(base_of(model_type), groups_of(model_type))
    before = host.frozen_digest()
    host.updates.prepare_training("policy", OPTIM, 3)
    start = {n: p.detach().clone() for n, p in adapter_parameters(host.state.model, "policy").items()}
    losses = [host.updates.update(BATCH, SftLoss(), step)["loss"] for step in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert host.frozen_digest() == before
    for name, parameter in adapter_parameters(host.state.model, "policy").items():
        assert not torch.equal(parameter, start[name]), name
    # An update starts from the log-probabilities that were recorded: training computes as scoring does.
    assert host.updates.evaluate(BATCH, SftLoss(), "policy")["loss"] == pytest.approx(
        host.updates.update(BATCH, SftLoss(), 2)["loss"], rel=1e-5
    )


@pytest.mark.parametrize("model_type", architectures(fast=["gpt_oss"]))
def test_all_parameters_train(model_type: str, base_of: Callable[..., Path]) -> None:
    host = ModelHost(HostSpec(model=ModelSpec(base=str(base_of(model_type)), lora=None)))
    host.updates.prepare_training(None, OPTIM, 2)
    losses = [host.updates.update(BATCH, SftLoss(), step)["loss"] for step in range(2)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    "model_type",
    architectures([t for t, row in ARCHITECTURES.items() if row.packs != "no"], fast=["deepseek_v3"]),
)
def test_packed_and_padded_rows_train_alike(
    model_type: str, base_of: Callable[..., Path], groups_of: Callable[[str], list[TargetGroup]]
) -> None:
    curves = []
    for packing in (True, False):
        host = host_of(base_of(model_type), groups_of(model_type), packing=packing)
        host.updates.prepare_training("policy", OPTIM, 3)
        curves.append([host.updates.update(BATCH, SftLoss(), step)["loss"] for step in range(3)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.parametrize(
    "model_type",
    architectures([t for t in ARCHITECTURES if has_sequence_classifier(t) and t != "qwen3_next"], fast=[]),
)
def test_a_reward_model_is_a_classifier_of_plain_transformers(
    model_type: str, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    groups: list[TargetGroup] = ["attention", *(["experts"] if ARCHITECTURES[model_type].is_moe else [])]
    host = host_of(base_of(model_type), groups)
    host.add_head("policy", "normal")
    host.updates.prepare_training("policy", OPTIM, 2)
    pairs = Batch.from_sequences(SEQUENCES, [[False] * 3 + [True] * (len(s) - 3) for s in SEQUENCES], 2)
    for step in range(2):
        host.updates.update(pairs, RewardLoss(), step)
    host.saving.save_adapter("policy", tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(
        base_of(model_type), num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        theirs = [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in SEQUENCES]
    ours = host.scores.scores(pairs, "policy")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(ours).max() > 0.01

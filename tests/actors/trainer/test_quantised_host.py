"""A model worker on a quantised base: every role's numbers are those on the dequantised weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from actors.algorithms.sft import SftLoss
from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.lora.adapters import adapter_digest
from actors.models.quantization.layout import Rounding
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import OptimSpec
from tests.actors.trainer.host_cases import policy_host, random_rows, sft_batch

BATCH = sft_batch(random_rows(8))


@pytest.fixture(scope="module")
def dequantised(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with the weights in its files that NF4 gives back."""
    copy = tmp_path_factory.mktemp("dequantised") / "base"
    shutil.copytree(tiny_base, copy)
    files = BaseCheckpoint(tiny_base, Rounding("nf4", AutoConfig.from_pretrained(tiny_base), torch.float32))
    save_file({n: files.tensor(n) for n in files.shapes}, copy / "model.safetensors", {"format": "pt"})
    return copy


def training(base: Path, **settings: Any) -> ModelHost:
    host = policy_host(base, **settings)
    host.add_adapter("reward", trainable=False)
    host.add_head("reward", "normal")
    host.updates.prepare_training("policy", OptimSpec(learning_rate=2e-3), 6)
    return host


def steps(host: ModelHost, numbers: range) -> list[float]:
    return [host.updates.update(BATCH, SftLoss(), number)["loss"] for number in numbers]


def test_training_and_the_scores_of_all_roles_equal_those_on_dequantised_weights(
    tiny_base: Path, dequantised: Path
) -> None:
    small, whole = training(tiny_base, quantization="nf4"), training(dequantised)
    before = small.frozen_digest()
    assert steps(small, range(3)) == steps(whole, range(3))
    assert adapter_digest(small.state.model, "policy") == adapter_digest(whole.state.model, "policy")
    assert small.frozen_digest() == before
    for role in ("policy", None):
        found, expected = (host.scores.token_logprobs(BATCH, role) for host in (small, whole))
        assert np.array_equal(found, expected)
    found, expected = (host.scores.scores(BATCH, "reward") for host in (small, whole))
    assert np.array_equal(found, expected)


def test_a_resumed_and_a_parked_host_end_where_an_undisturbed_one_does(
    tiny_base: Path, tmp_path: Path
) -> None:
    undisturbed, other = (training(tiny_base, quantization="nf4") for _ in range(2))
    expected = steps(undisturbed, range(4))
    assert steps(other, range(2)) == expected[:2]
    other.residence.park("all")
    assert all((part.view(torch.uint8) == 0xFF).all() for p in small_parts(other) for part in p)
    other.residence.wake()
    other.saving.save_checkpoint(tmp_path, "policy")
    resumed = training(tiny_base, quantization="nf4")
    assert resumed.saving.load_checkpoint(tmp_path, "policy") == 2
    assert steps(resumed, range(2, 4)) == expected[2:] == steps(other, range(2, 4))


def small_parts(host: ModelHost) -> list[tuple[torch.Tensor, ...]]:
    from actors.models.quantization.quantised_tensor import QuantisedTensor

    return [p.parts for p in host.state._base.parameters() if isinstance(p, QuantisedTensor)]

"""Savings of the scorer: the last experts leave out tokens that nobody reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.models.moe import experts_forward
from actors.models.moe.grouped_mlp import Routes
from tests.actors.trainer.host_cases import policy_host, random_rows, sft_batch


def test_the_last_experts_compute_only_tokens_that_are_read(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = policy_host(tiny_base)
    batch = sft_batch(random_rows(6))
    asked: list[torch.Tensor | None] = []

    class Recorded(Routes):
        @staticmethod
        def of(top_k_index: torch.Tensor, n_experts: int, wanted: torch.Tensor | None = None) -> Routes:
            asked.append(wanted)
            return Routes.of(top_k_index, n_experts, wanted)

    monkeypatch.setattr(experts_forward, "Routes", Recorded)
    sparing = host.scores.token_logprobs(batch, "policy")
    _, micros = host.state.runner.shard(batch)
    assert len(micros) == 1
    *others, last = asked
    assert len(others) == host.state.config.num_hidden_layers - 1
    assert all(wanted is None for wanted in others)
    assert last is not None
    assert last.tolist() == np.unique(micros[0].predictors).tolist()
    assert len(last) < micros[0].input_ids.size

    host.state.runner.scorer.last_experts = None
    assert np.abs(host.scores.token_logprobs(batch, "policy") - sparing).max() < 1e-6


def test_experts_that_other_layers_read_are_never_spared() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.zeros(2, 3, 4))

    class Model(torch.nn.Module):
        def __init__(self, *layers: torch.nn.Module) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(layers)

        @property
        def base_model(self) -> torch.nn.Module:
            return self

    experts = Experts()
    assert experts_forward.last_experts(Model(torch.nn.Identity(), experts)) is experts
    assert experts_forward.last_experts(Model(experts, torch.nn.Linear(2, 2))) is None
    assert experts_forward.last_experts(Model()) is None

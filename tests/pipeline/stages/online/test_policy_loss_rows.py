"""A policy loss is one row of a table: a row that was added trains, and every row is whole and documented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch import Tensor

from actors.algorithms.advantages import ADVANTAGES
from actors.algorithms.policy_losses import (
    POLICY_LOSSES,
    PolicyLossRow,
    PolicySettings,
    Problems,
    Surrogate,
    tokens,
)
from actors.batches.batch import Batch
from actors.batches.generations import Generations
from actors.batches.trajectories import trajectory_batch
from pipeline.config.json_schema import json_schema
from pipeline.config.load import load_config, validate
from pipeline.stages.online.estimates import Estimates, TokenScores
from pipeline.stages.online.objectives import objective_of
from pipeline.stages.specs.registry import STAGE_TYPES, GrpoStage, OnlineStage
from tests.actors.trainer.host_cases import policy_host

LENGTHS = (2, 5, 3, 4)
"""Tokens of the samples, two of each prompt."""
REWARDS = np.array([1.0, 0.0, 0.0, 1.0])


def importance_weighted(ratio: Tensor, logps: Tensor, advantages: Tensor, spec: PolicySettings) -> Surrogate:
    """-r A, not clipped: no loss of the table."""
    far = (ratio - 1).abs() > spec.epsilon
    return Surrogate(-ratio * advantages, {"far_ratio": far})


def no_entropy(spec: PolicySettings) -> Problems:
    if spec.entropy_coef:
        yield "entropy_coef", "unclipped has no entropy bonus; leave it out"


@pytest.fixture
def _a_row_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    row = PolicyLossRow(importance_weighted, tokens, "tokens, unclipped", problems=no_entropy)
    monkeypatch.setitem(POLICY_LOSSES, "unclipped", row)


def run_of(**stage: Any) -> dict[str, Any]:
    grpo = {"data": "x", "rewards": "exact_match", "batch_size": 4, "num_generations": 2, **stage}
    return {"name": "r", "model": {"base": "b"}, "stages": {"grpo": grpo}}


def stage_of(tmp_path: Path, **stage: Any) -> OnlineStage:
    """As a user writes it."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_of(**stage)))
    return load_config(path).online_stages()["grpo"]


def estimated(spec: OnlineStage, batch: Batch, logps: np.ndarray) -> Estimates:
    scores = TokenScores(old_logps=logps, ref_logps=logps)
    return objective_of(spec).estimate(batch, REWARDS, scores, beta=0.0)


def sampled() -> Batch:
    samples = Generations.of([([7 + n] * n, [-1.0] * n, "stop") for n in LENGTHS], 2, "v0", 0.0)
    return trajectory_batch([[1, 2]] * 2 + [[3, 4, 5]] * 2, samples)


@pytest.mark.usefixtures("_a_row_is_added")
def test_a_row_that_was_added_trains_the_policy(tiny_base: Path, tmp_path: Path) -> None:
    """Its loss at ratio 1 is minus the mean advantage of tokens; a step along its gradient lowers it."""
    spec = stage_of(tmp_path, loss_type="unclipped", num_iterations=2, learning_rate=1e-2)
    host, batch = policy_host(tiny_base), sampled()
    found = estimated(spec, batch, host.scores.token_logprobs(batch, "policy", spec.temperature))
    loss = objective_of(spec).loss(0.0, "float32")
    host.updates.prepare_training("policy", spec.optim_spec(), 2)
    first, second = (host.updates.update(found.batch, loss, step, "policy") for step in (0, 1))
    mean_advantage = float(found.batch.token_columns["advantages"].mean())
    assert abs(mean_advantage) > 0.1
    assert first["loss"] == pytest.approx(-mean_advantage, abs=1e-5)
    assert first["grad_norm"] > 0
    assert second["loss"] < first["loss"] - 1e-4
    assert (first["far_ratio"], second["ratio/max_deviation"] > 1e-3) == (0.0, True)


@pytest.mark.usefixtures("_a_row_is_added")
def test_choices_rules_messages_and_schema_follow_from_the_table() -> None:
    assert validate(run_of(loss_type="unclipped"))[1] == []
    (broken,) = validate(run_of(loss_type="unclipped", entropy_coef=0.1))[1]
    assert broken == ("stages.grpo.entropy_coef", "unclipped has no entropy bonus; leave it out")
    (misspelt,) = validate(run_of(loss_type="unclippd"))[1]
    assert misspelt.path == "stages.grpo.loss_type"
    assert "not one of grpo, bnpo, dapo, dr_grpo, cispo, unclipped" in misspelt.message
    assert "did you mean" in misspelt.message
    assert json_schema()["$defs"]["GrpoStage"]["properties"]["loss_type"]["enum"] == list(POLICY_LOSSES)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_samples_of_a_step_have_every_column_of_a_row(name: str) -> None:
    bound = {"epsilon_high": 5.0} if name == "cispo" else {}
    data = {"data": [{"source": "x"}], "rewards": [{"source": "exact_match"}]}
    spec = GrpoStage(**data, batch_size=4, num_generations=2, num_iterations=2, loss_type=name, **bound)
    batch = estimated(spec, sampled(), np.full(sum(LENGTHS), -1.0)).batch
    loss = objective_of(spec).loss(0.0, "float32")
    assert set(loss.required_columns) <= {*batch.columns, *batch.token_columns}
    assert loss.totals(batch)["divisor"] > 0


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_policy_loss_is_documented(name: str, repository: Path) -> None:
    text = (repository / "docs/algorithms.md").read_text()
    table = text[text.index("| `loss_type` |") :]
    first_cells = re.findall(r"^\| ([^|]*) \|", table[: table.index("\n\n")], re.MULTILINE)
    assert any(f"`{name}`" in cell for cell in first_cells[1:])
    description = GrpoStage.model_fields["loss_type"].description
    assert description is not None
    assert f"`{name}` over " in description


def test_every_advantage_is_that_of_a_stage_which_is_documented(repository: Path) -> None:
    text = (repository / "docs/algorithms.md").read_text()
    table = text[text.index("| `type` | advantage |") :]
    of_stages = {
        name: kind for name, spec in STAGE_TYPES.items() if (kind := getattr(spec, "advantage", None))
    }
    assert set(of_stages.values()) == set(ADVANTAGES)
    assert all(f"\n| `{name}` |" in table[: table.index("\n\n")] for name in of_stages)

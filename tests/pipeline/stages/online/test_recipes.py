"""The recipes of docs/algorithms.md: each loads, and GRPO as published computes what its paper writes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from actors.algorithms.loss import TokenView
from actors.batches.generations import Generations
from actors.batches.trajectories import trajectory_batch
from pipeline.config.load import validate
from pipeline.stages.online.estimates import TokenScores
from pipeline.stages.online.objectives import objective_of
from pipeline.stages.specs.registry import GrpoStage

ROOT = Path(__file__).parents[4]
LENGTHS, GROUP = (2, 5, 1, 4, 3, 3), 3
"""Tokens of the samples, three of each prompt."""
REWARDS = (1.0, 0.0, 0.25, 3.0, 2.0, -1.0)


def recipes() -> dict[str, dict[str, Any]]:
    """Keys with their values, by recipe; keys that stand without a value are the reader's to choose."""
    text = (ROOT / "docs/algorithms.md").read_text()
    table = text[text.index("| recipe | keys |") :]
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \|$", table[: table.index("\n\n")], re.MULTILINE)[1:]
    return {
        name: {k: v for one in re.findall(r"`([^`]*: [^`]*)`", keys) for k, v in yaml.safe_load(one).items()}
        for name, keys in rows
        if not name.startswith("---")
    }


def run_of(**stage: Any) -> dict[str, Any]:
    stages = {"rl": {"data": "x", "rewards": "exact_match", **stage}}
    return {"name": "r", "model": {"base": "b"}, "stages": stages}


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_stage(name: str) -> None:
    assert validate(run_of(**recipes()[name]))[1] == []


def paper(logps: torch.Tensor, old: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Minus eq. 3 of arXiv 2402.03300 with the divergence of eq. 4, a token after the other; the standard
    deviation is unbiased and has 1e-4 added, where the paper says nothing."""
    objective, start = torch.zeros((), dtype=torch.float64), 0
    for i, length in enumerate(LENGTHS):
        group = np.array(REWARDS[i - i % GROUP :][:GROUP])
        advantage = (REWARDS[i] - group.mean()) / (group.std(ddof=1) + 1e-4)
        for t in range(start, start + length):
            ratio = torch.exp(logps[t] - old[t])
            clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
            other = ref[t] - logps[t]
            divergence = torch.exp(other) - other - 1
            token = torch.minimum(ratio * advantage, clipped * advantage) - 0.04 * divergence
            objective = objective + token / length / len(LENGTHS)
        start += length
    return -objective


def test_grpo_as_published_is_the_papers_loss_and_gradient() -> None:
    keys = recipes()["GRPO as published"] | {"num_generations": GROUP, "batch_size": len(LENGTHS)}
    config, problems = validate(run_of(**keys))
    assert config is not None, problems
    spec = config.stages["rl"]
    assert isinstance(spec, GrpoStage)
    assert spec.updates_per_step == 1
    generator = np.random.default_rng(0)
    old, ref, new = -1.5 + generator.normal(0, 0.4, size=(3, sum(LENGTHS)))
    samples = Generations.of([([5] * n, [-1.0] * n, "stop") for n in LENGTHS], GROUP, "v", 0.0)
    batch = trajectory_batch([[1]] * len(LENGTHS), samples)
    objective = objective_of(spec)
    found = objective.estimate(batch, np.array(REWARDS), TokenScores(old_logps=old, ref_logps=ref), spec.beta)
    logps = torch.tensor(new, requires_grad=True)
    columns = {name: torch.tensor(found.batch.token_columns[name]) for name in found.batch.token_columns}
    zeros = torch.zeros(sum(LENGTHS))
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    view = TokenView(logps, sequence, len(LENGTHS), zeros, zeros.bool(), zeros, zeros, token_columns=columns)
    loss = objective.loss(spec.beta, "float32")
    ours = loss(view, loss.totals(found.batch))[0]
    theirs = paper(logps, torch.tensor(old), torch.tensor(ref))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    gradients = [torch.autograd.grad(one, logps)[0].tolist() for one in (ours, theirs)]
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-12)
    assert not math.isclose(theirs.item(), 0.0, abs_tol=1e-3)

"""Whole curves of GRPO and RLOO equal those of TRL's trainers.

The same prompts, samples and rewards go into both; sampling itself is left out. The curves run on LoRA
(attention and experts), packed here and padded there, 12 optimizer steps with two on every generation, so
that ratios leave 1 and clipping acts.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.algorithms.advantages import AdvantageSpec, Scored, advantages_of
from actors.algorithms.checks import RATIO_TOLERANCE, check_first_ratio
from actors.algorithms.kl import kl_values
from actors.algorithms.policy import PolicyLoss
from actors.algorithms.reward_shaping import combine, reward_metrics
from actors.batches.batch import Batch
from actors.batches.trajectories import sample_offsets
from actors.trainer.model_host import ModelHost
from tests.actors.trainer.host_cases import policy_host, random_rows
from tests.equal_to_trl.test_offline_steps import OPTIM, trl_arguments, trl_model

pytestmark = pytest.mark.trl

STEPS, GROUP, PER_STEP = 12, 3, 2
BATCH = GROUP * PER_STEP
ITERATIONS = 2


class Fixed:
    """Samples that stand in for sampling: `GROUP` completions of every prompt."""

    def __init__(self) -> None:
        n = STEPS // ITERATIONS * PER_STEP
        rows = random_rows(n * GROUP, seed=5)
        self.prompts = [rows[i * GROUP][0] for i in range(n)]
        self.completions = [[rows[i * GROUP + k][1] for k in range(GROUP)] for i in range(n)]
        self.eos = 2
        for group in self.completions:
            for completion in group[1:]:  # the first of each group is cut at the limit
                completion[-1] = self.eos

    def of(self, names: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Prompt and completion of each sample, for prompts named by their numbers, each `GROUP` times."""
        numbers = [int(name) for name in names]
        taken: dict[int, int] = defaultdict(int)
        completions = []
        for number in numbers:
            completions.append(list(self.completions[number][taken[number]]))
            taken[number] += 1
        return [list(self.prompts[n]) for n in numbers], completions


def brightness(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) / len(ids) / 256 for ids in completion_ids]


def parity(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Passes samples over whose last token is large."""
    return [None if ids[0] > 200 else float(ids[0] % 2) for ids in completion_ids]


FUNCTIONS, WEIGHTS = (brightness, parity), (1.0, 0.5)


def trl_curve(
    kind: str, base: Path, host: ModelHost, directory: Path, **settings: Any
) -> list[dict[str, float]]:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    fixed = Fixed()
    trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")

    class FromFixed(trainer_class):  # type: ignore[misc, valid-type]
        def _generate(self, prompts: list[str]) -> Any:
            ids, completions = fixed.of(prompts)
            texts = ["-"] * len(ids)
            rest = (None, texts, None, {}, None, None) if kind == "GRPO" else (texts,)
            return (ids, completions, *rest)

    arguments = trl_arguments(directory)
    for name in ("max_length", "per_device_train_batch_size"):
        arguments.pop(name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(fixed.eos)
    trainer = FromFixed(
        model=trl_model(base, host, directory),
        reward_funcs=list(FUNCTIONS),
        args=config_class(
            **arguments, per_device_train_batch_size=BATCH, num_generations=GROUP, max_completion_length=40,
            num_iterations=ITERATIONS, shuffle_dataset=False, reward_weights=list(WEIGHTS), **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(fixed.prompts))]),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def scored_batch(host: ModelHost, first: int, advantage: AdvantageSpec, loss: PolicyLoss, beta: float) -> Any:
    """Our way from fixed samples to a batch with every column; `beta`: KL in the reward."""
    fixed = Fixed()
    prompts, completions = fixed.of([str(first + i // GROUP) for i in range(BATCH)])
    batch = Batch.from_sequences(
        [p + c for p, c in zip(prompts, completions, strict=True)],
        [[False] * len(p) + [True] * len(c) for p, c in zip(prompts, completions, strict=True)],
    )
    rewards = np.array([f(completion_ids=completions) for f in FUNCTIONS], dtype=np.float64)
    old = host.scores.token_logprobs(batch, "policy", loss.temperature)
    ref = host.scores.token_logprobs(batch, None, loss.temperature)
    kl = beta * kl_values("k1", old, ref)
    found = advantages_of(advantage, Scored(combine(rewards, WEIGHTS), sample_offsets(batch), -kl))
    per_step = np.full(BATCH, float(batch.label_counts.sum()))
    batch = batch.with_token_columns(old_logps=old, ref_logps=ref, advantages=found.advantages)
    metrics = reward_metrics([f.__name__ for f in FUNCTIONS], rewards, WEIGHTS, GROUP)
    return batch.with_columns(tokens_per_step=per_step), metrics


def our_curve(
    host: ModelHost, advantage: AdvantageSpec, loss: PolicyLoss, beta: float
) -> list[dict[str, float]]:
    host.updates.prepare_training("policy", OPTIM, STEPS)
    curve = []
    for generation in range(STEPS // ITERATIONS):
        batch, rewards = scored_batch(host, generation * PER_STEP, advantage, loss, beta)
        for iteration in range(ITERATIONS):
            metrics = host.updates.update(batch, loss, generation * ITERATIONS + iteration)
            if iteration == 0:
                check_first_ratio(metrics, RATIO_TOLERANCE["float32"])
            curve.append({**metrics, **rewards, "size": np.abs(batch.token_columns["advantages"]).mean()})
    return curve


REWARDS = (
    "reward", "reward_std", "frac_reward_zero_std", "rewards/brightness/mean", "rewards/brightness/std",
    "rewards/parity/mean", "rewards/parity/std",
)  # fmt: skip
"""TRL logs them when it samples."""
CLIPS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")

CURVES: dict[str, tuple[str, dict[str, Any], AdvantageSpec, PolicyLoss, float]] = {
    "grpo": (
        "GRPO",
        {"loss_type": "grpo", "beta": 0.2, "scale_rewards": "group", "epsilon": 0.02, "temperature": 0.8,
         "entropy_coef": 0.01},
        AdvantageSpec(kind="group", num_generations=GROUP),
        PolicyLoss(loss_type="grpo", beta=0.2, epsilon=0.02, temperature=0.8, entropy_coef=0.01),
        0.0,
    ),
    "rloo": (
        "RLOO",
        {"beta": 0.05, "epsilon": 0.05, "temperature": 0.8},
        AdvantageSpec(kind="rloo", num_generations=GROUP),
        PolicyLoss(loss_type="grpo", importance_sampling_level="trajectory", epsilon=0.05, temperature=0.8),
        0.05,
    ),
    "dapo, batch scale": (
        "GRPO",
        {"loss_type": "dapo", "scale_rewards": "batch", "epsilon": 0.01, "epsilon_high": 0.03,
         "temperature": 1.0},
        AdvantageSpec(kind="group", num_generations=GROUP, scale_rewards="batch"),
        PolicyLoss(loss_type="dapo", epsilon=0.01, epsilon_high=0.03),
        0.0,
    ),
    "dr_grpo": (
        "GRPO",
        {"loss_type": "dr_grpo", "scale_rewards": "none", "temperature": 1.0, "delta": 1.05, "epsilon": 0.02},
        AdvantageSpec(kind="group", num_generations=GROUP, scale_rewards="none"),
        PolicyLoss(loss_type="dr_grpo", max_completion_length=40, delta=1.05, epsilon=0.02),
        0.0,
    ),
    "gspo": (
        "GRPO",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-3, "epsilon_high": 4e-3,
         "temperature": 1.0},
        AdvantageSpec(kind="group", num_generations=GROUP),
        PolicyLoss(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-3, epsilon_high=4e-3),
        0.0,
    ),
    "cispo": (
        "GRPO",
        {"loss_type": "cispo", "epsilon_high": 1.02, "temperature": 1.0},
        AdvantageSpec(kind="group", num_generations=GROUP),
        PolicyLoss(loss_type="cispo", epsilon_high=1.02),
        0.0,
    ),
}  # fmt: skip
IN_MAKE_TEST = ("grpo", "rloo")


@pytest.mark.parametrize(
    "name", [n if n in IN_MAKE_TEST else pytest.param(n, marks=pytest.mark.slow) for n in CURVES]
)
def test_a_curve_equals_trls(name: str, tiny_base: Path, tmp_path: Path) -> None:
    kind, settings, advantage, loss, beta = CURVES[name]
    host = policy_host(tiny_base)
    theirs = trl_curve(kind, tiny_base, host, tmp_path, **settings)
    ours = our_curve(host, advantage, loss, beta)
    assert len(ours) == len(theirs) == STEPS
    names = ["loss", "grad_norm", "learning_rate", "entropy"]
    if kind == "GRPO":  # RLOO's clip ratios and KL are means of samples and of the sampling policy
        clips = ("cispo_clip_ratio",) if loss.loss_type == "cispo" else CLIPS
        names += [
            *(clips if loss.importance_sampling_level == "token" else ()),
            *(["kl"] if loss.beta else []),
        ]
        assert max(step[clips[-1]] for step in theirs) > 0
    for step, (mine, trl) in enumerate(zip(ours, theirs, strict=True)):
        for key in (*names, *(() if step % ITERATIONS else REWARDS)):
            # the loss is what is left of advantages of both signs: measured against their size
            scale = mine["size"] if key == "loss" else 0.0
            # and the norm of the gradient, which cancels as much, moved by 1.02e-5 with the thread count
            limit = 2e-5 if key == "grad_norm" else 1e-5
            assert mine[key] == pytest.approx(trl[key], rel=limit, abs=1e-6 + 1e-5 * scale), (step, key)

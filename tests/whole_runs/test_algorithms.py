"""KTO, online DPO, REINFORCE++ and distillation in one run on real Ray, real vLLM and real weight syncs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.whole_runs.runs import TINY_MOE, command_of, complete, lines_of
from tests.whole_runs.test_online import command_for, config

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]

DATA = {"source": "builtin:arithmetic", "max_rows": 64}
ONLINE = {
    "data": DATA | {"split": "prompts"},
    "batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_length": 64,
    "max_steps": 2,
    "learning_rate": 1e-3,
}
STAGES: dict[str, Any] = {
    "kto": {"data": DATA | {"split": "preference"}, "batch_size": 8, "max_steps": 2, "max_length": 64},
    "online_dpo": ONLINE | {"rewards": "exact_match", "steps_per_generation": 2, "max_resampling_rounds": 1},
    "reinforce_pp": ONLINE | {"rewards": "shaped:digits", "soft_punish_cache": 4, "max_steps": 1},
    "distill": ONLINE | {"teacher": "kto", "num_generations": 1, "max_steps": 1},
    "top": ONLINE | {"type": "distill", "teacher": "kto", "teacher_top_k": 4, "beta": 0.5, "max_steps": 1},
}


def test_every_new_stage_runs_after_the_other_and_logs_what_it_is_about(tmp_path: Path) -> None:
    command_for(tmp_path)  # For its reward function.
    settings = config(tmp_path / "run")
    settings["model"] = {"base": str(TINY_MOE), "lora": {"r": 4, "lora_alpha": 8}}
    settings["stages"] = STAGES
    complete(command_of(tmp_path, settings), tmp_path)
    kto = lines_of(tmp_path / "run", "kto")
    assert kto[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert kto[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    pairs = lines_of(tmp_path / "run", "online_dpo")
    assert pairs[0]["pairs"] > 0
    assert 0 < pairs[0]["frac_pairs"] <= 1
    assert pairs[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert pairs[0]["dynamic_sampling/prompts"] >= 8
    assert {"dynamic_sampling/rounds", "frac_reward_zero_std", "reward"} <= set(pairs[1])
    last = lines_of(tmp_path / "run", "reinforce_pp")[-1]
    assert last["advantages/std"] == pytest.approx(1.0, abs=0.02)
    assert last["rewards/overlong/mean"] <= 0
    assert (tmp_path / "run" / "reinforce_pp" / "adapter" / "adapter_model.safetensors").is_file()
    (taught,) = lines_of(tmp_path / "run", "distill")
    assert taught["kl"] > 0
    assert taught["objective/kl"] == pytest.approx(taught["kl"] * taught["completions/mean_length"])
    assert taught["advantages/std"] > 0
    assert "reward" not in taught
    (top,) = lines_of(tmp_path / "run", "top")
    assert 0 < top["loss"] < math.log(2)  # The most that Jensen-Shannon's divergence can be.
    assert 0.5 < top["teacher_top_mass"] <= 1
    assert "advantages/std" not in top

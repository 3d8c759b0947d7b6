"""A run that serves its own judge: engines with another model, on real Ray and real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.models.tiny import write_tiny_base
from tests.whole_runs.runs import TINY_MOE, command_of, complete, lines_of
from tests.whole_runs.test_online import config

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]


def test_a_judge_of_the_run_scores_samples_with_a_model_of_its_own(tmp_path: Path) -> None:
    """The embedded base is asked a sum: the number in its answer is the verdict on another base's."""
    write_tiny_base(tmp_path / "policy", seed=3, num_hidden_layers=2)
    (tmp_path / "judge.txt").write_text("{completion}\n{answer}+3=?")
    judge = {"kind": "judge", "model": str(TINY_MOE), "prompt": str(tmp_path / "judge.txt"), "on_error": -1}
    settings = config(tmp_path / "run")
    settings["model"] = {"base": str(tmp_path / "policy"), "lora": {"r": 4, "lora_alpha": 8}}
    settings["stages"] = {
        "grpo": {
            "data": {"source": "builtin:arithmetic", "max_rows": 64, "split": "prompts"},
            "rewards": [judge | {"pattern": r"(\d+)", "max_tokens": 8, "timeout_s": 120}],
            "batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_length": 64,
            "max_steps": 2,
        }
    }
    complete(command_of(tmp_path, settings), tmp_path)
    lines = lines_of(tmp_path / "run", "grpo")
    kept = (tmp_path / "run" / "grpo" / "answers.jsonl").read_text().splitlines()
    assert 16 < len(kept) <= 32
    assert all("rewards/judge/mean" in line for line in lines)
    assert any(line["rewards/judge/mean"] > 0 for line in lines)
    assert (tmp_path / "run" / "logs" / "judge-0.log").is_file()

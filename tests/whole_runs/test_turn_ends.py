"""A base whose template ends turns with another token than its EOS, as those of Qwen: samples end there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.pipeline.data.tokens.one_row import CHATML
from tests.whole_runs.runs import TINY_MOE, command_of, complete, lines_of, raylign

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]

TURN_END, EOS = 258, 256
LIMIT = 16


def base_with_another_eos(path: Path) -> Path:
    """The embedded base, all of whose files say that a text ends with <|endoftext|>."""
    shutil.copytree(TINY_MOE, path)
    changes = {"config.json": ("eos_token_id", EOS), "generation_config.json": ("eos_token_id", EOS)}
    changes["tokenizer_config.json"] = ("eos_token", "<|endoftext|>")
    for name, (key, value) in changes.items():
        held = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(held | {key: value}))
    (path / "chat_template.jinja").write_text(CHATML)
    return path


@pytest.mark.slow
def test_rollouts_evaluation_chat_and_the_merged_model_stop_at_the_templates_end(tmp_path: Path) -> None:
    base = base_with_another_eos(tmp_path / "base")
    config = {
        "name": "ends",
        "output_dir": str(tmp_path / "run"),
        "model": {"base": str(base), "lora": {"r": 4, "lora_alpha": 8}},
        "stages": {
            "grpo": {
                "data": {"source": "builtin:arithmetic", "split": "prompts", "max_rows": 64},
                "rewards": "exact_match",
                "batch_size": 16,
                "num_generations": 4,
                "max_steps": 2,
                "max_length": 64,
                "max_completion_length": LIMIT,
            }
        },
        "eval": {
            "data": {"source": "builtin:arithmetic", "split": "test"},
            "models": ["base"],
            "max_rows": 64,
            "sampling": {"max_tokens": LIMIT},
        },
    }
    complete(command_of(tmp_path / "work", config), tmp_path)
    steps = lines_of(tmp_path / "run", "grpo")
    # An engine that knows the EOS alone cuts every sample at the limit.
    assert max(step["completions/clipped_ratio"] for step in steps) < 0.5
    # The base as it comes answers a third; an engine that goes on after the answer is never right.
    assert json.loads((tmp_path / "run" / "eval" / "base.json").read_text())["accuracy"] > 0.1

    adapter = str(tmp_path / "run" / "grpo" / "adapter")
    said = raylign("chat", adapter, "--prompt", "2+2=?", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "user" not in said.stdout, "the answer ends before the next turn"
    done = raylign("merge", adapter, str(tmp_path / "merged"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    held = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert held["eos_token_id"] == [TURN_END, EOS]

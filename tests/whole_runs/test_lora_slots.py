"""GRPO whose engines keep the policy's LoRA in slots beside the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.whole_runs.runs import (
    TINY_MOE,
    adapter_digest,
    command_of,
    complete,
    kill_an_engine_as_it_generates,
    lines_of,
    start,
)
from tests.whole_runs.test_online import REWARD

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]


def config(output: Path, engines: int) -> dict[str, Any]:
    return {
        "name": "slots",
        "output_dir": str(output),
        "seed": 5,
        "model": {"base": str(TINY_MOE), "lora": {"r": 4, "lora_alpha": 6, "targets": ["attention"]}},
        "stages": {
            "grpo": {
                "data": {"source": "builtin:arithmetic", "max_rows": 64, "split": "prompts"},
                "rewards": ["shaped:digits"],
                "batch_size": 16,
                "num_generations": 4,
                "max_completion_length": 8,
                "max_length": 64,
                "max_steps": 3,
                "learning_rate": 1e-2,
                "max_resampling_rounds": 0,
                "sync": {"payload": "lora"},
            }
        },
        "roles": {"rollout": {"workers": engines}},
    }


@pytest.mark.slow
def test_two_engines_with_slots_of_which_one_is_killed_make_the_adapter_of_one(tmp_path: Path) -> None:
    (tmp_path / "shaped.py").write_text(REWARD)
    whole, run = tmp_path / "whole", tmp_path / "run"
    complete(command_of(tmp_path, config(whole, engines=1)), tmp_path)
    process = start(command_of(tmp_path, config(run, engines=2)), tmp_path)
    kill_an_engine_as_it_generates(process, run)
    assert adapter_digest(run, "grpo") == adapter_digest(whole, "grpo")
    assert lines_of(run, "grpo")[-1]["grad_norm"] > 0
    for lines in (lines_of(whole, "grpo"), lines_of(run, "grpo")):
        assert [line["sync/version"] for line in lines] == [1, 2, 3]
        assert all(line["mismatch/max"] < 1e-4 and line["sync/probe_max"] < 1e-4 for line in lines)
        assert all("sync/unchanged_bf16" not in line for line in lines)
        # A and B alone, in float32: 4 layers of q, k, v, o.
        assert {line["sync/bytes"] for line in lines} == {57344}

"""SFT -> GRPO with sharded policy and reference, on real Ray and real vLLM with verified weight syncs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.whole_runs.runs import TINY_MOE, command_of, complete

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

REFERENCE = {"none": "none", "full": "base", "experts": "experts"}
"""What the reference splits, by what the policy does."""


def config(output: Path, sharding: str) -> dict[str, Any]:
    data = {"source": "builtin:arithmetic", "max_rows": 64}
    sizes = {"max_steps": 2, "max_length": 64, "learning_rate": 1e-3}
    return {
        "name": "sharded",
        "output_dir": str(output),
        "model": {"base": str(TINY_MOE), "lora": {"r": 4, "lora_alpha": 8}},
        "stages": {
            "sft": {"data": data | {"split": "train"}, "batch_size": 8, **sizes},
            "grpo": {
                "data": data | {"split": "prompts"},
                "rewards": "exact_match",
                "batch_size": 16,
                "num_generations": 4,
                "max_completion_length": 8,
                "beta": 0.05,
                **sizes,
            },
        },
        "roles": {
            "policy": {"workers": 2, "sharding": sharding},
            "reference": {"workers": 2, "sharding": REFERENCE[sharding]},
        },
    }


def run(directory: Path, sharding: str) -> Path:
    complete(command_of(directory, config(directory / "run", sharding)), directory)
    return directory / "run"


def test_a_run_with_sharded_roles_ends_like_one_without(tmp_path: Path) -> None:
    runs = {sharding: run(tmp_path / sharding, sharding) for sharding in REFERENCE}
    found = {by: load_file(where / "sft/adapter/adapter_model.safetensors") for by, where in runs.items()}
    for sharding in ("full", "experts"):
        for name, tensor in found["none"].items():
            # Of a gradient that is little more than rounding Adam makes a step of up to the rate of 1e-3.
            torch.testing.assert_close(found[sharding][name], tensor, rtol=1e-4, atol=1e-5)
        assert (runs[sharding] / "grpo/adapter/adapter_model.safetensors").is_file()

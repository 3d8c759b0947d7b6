"""SFT -> GRPO with a policy and a reference that two ranks hold together, on real Ray and real vLLM with
verified weight syncs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.whole_runs.runs import command_of, complete
from tests.whole_runs.test_sharding import config

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_on_ranks_that_hold_a_model_together_ends_like_one_on_others(tmp_path: Path) -> None:
    found = {}
    for ranks in (1, 2):
        run = config(tmp_path / f"run-{ranks}", "none")
        for role in ("policy", "reference"):
            run["roles"][role] = {"workers": 2, "tensor_parallel_size": ranks}
        if ranks == 1:
            del run["stages"]["grpo"]
        directory = tmp_path / str(ranks)
        directory.mkdir()
        complete(command_of(directory, run), directory)
        found[ranks] = load_file(tmp_path / f"run-{ranks}/sft/adapter/adapter_model.safetensors")
    for name, tensor in found[1].items():
        # Of a gradient that is little more than rounding Adam makes a step of up to the rate of 1e-3.
        torch.testing.assert_close(found[2][name], tensor, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "run-2/grpo/adapter/adapter_model.safetensors").is_file()

"""Rounding alone separates an engine in bfloat16 from transformers, as in transformers' own bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.cluster.worker_group import WorkerGroup
from actors.rollout.engine import EngineSpec
from actors.rollout.remote import ROLLOUT
from tests.actors.rollout.vllm.vllm_cases import ADAPTER, SEQUENCES, STARTS, Policy, push, scores

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]


def in_transformers(model: Path, dtype: torch.dtype) -> list[np.ndarray]:
    net, found = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval(), []
    for ids, start in zip(SEQUENCES, STARTS, strict=True):
        with torch.no_grad():
            logps = net(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found.append(logps[range(start - 1, len(ids) - 1), ids[start:]].numpy())
    return found


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return float(np.abs(np.concatenate(one) - np.concatenate(other)).mean())


def test_qwen3_next_is_no_further_off_in_an_engine_than_in_bfloat16_at_all(
    process: WorkerGroup, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM's kernels for its linear attention take nothing finer on the CPU. With a wrong kernel the engine
    would be further off; a state or a weight that an update missed would show in later versions."""
    base = base_of("qwen3_next", torch.bfloat16)
    policy = Policy(base, "qwen3_next")
    process.build(ROLLOUT, EngineSpec(max_num_seqs=8, max_model_len=512, dtype="bfloat16")).result()
    process.call_rank(0, "load", str(base), updatable=True, phase="load")
    engine, rounding = [], []
    for version in range(4):
        if version:
            policy.change(seed=version)
            push(process, policy.payload(ADAPTER, version))
        merged = policy.write(tmp_path / str(version), torch.bfloat16)
        exact = in_transformers(merged, torch.float32)
        engine.append(apart(scores(process), exact))
        rounding.append(apart(in_transformers(merged, torch.bfloat16), exact))
    assert sum(engine) < 1.5 * sum(rounding), (engine, rounding)

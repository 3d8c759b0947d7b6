"""Engines on a quantised base serve the dequantised weights that the trainer computes with, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.cluster.worker_group import WorkerGroup
from actors.models.tiny import byte_tokenizer
from actors.rollout.engine import EngineSpec
from actors.rollout.remote import ROLLOUT
from tests.actors.models.tiny_models import write_mxfp4
from tests.actors.rollout.vllm.vllm_cases import ADAPTER, SEQUENCES, STARTS, Policy, off, push, scores

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


def engine(process: WorkerGroup, base: Path, updatable: bool = True, **more: object) -> WorkerGroup:
    process.build(ROLLOUT, EngineSpec(max_num_seqs=16, max_model_len=512, **more)).result()  # type: ignore[arg-type]
    process.call_rank(0, "load", str(base), updatable=updatable, phase="load")
    return process


def test_a_synced_engine_is_to_the_bit_one_with_the_dequantised_merge(
    process: WorkerGroup, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    # Experts are quantised and not adapted: no sync brings them, the engine loads them so.
    base = base_of("qwen3_moe", torch.bfloat16)
    policy = Policy(base, "qwen3_moe", ["attention"], quantization="nf4", dtype="bfloat16")
    rollout = engine(process, base, quantization="nf4", dtype="bfloat16")
    for version in range(2):
        policy.change(seed=version)
        push(rollout, policy.payload(ADAPTER, version, torch.bfloat16))
    synced = scores(rollout)
    read = rollout.call_rank(0, "weights.readback", 1).digests
    assert read
    assert read == policy.digests(read, torch.bfloat16)
    merged = policy.write(tmp_path / "merged", torch.bfloat16)
    assert off(synced, scores(engine(process, merged, False, dtype="bfloat16"))) == 0.0


def test_an_engine_loads_experts_in_mxfp4_dequantised_and_is_updated(
    process: WorkerGroup, tmp_path: Path
) -> None:
    write_mxfp4(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    policy = Policy(tmp_path, "gpt_oss")
    rollout = engine(process, tmp_path)
    assert off(scores(rollout), policy.logps(SEQUENCES, STARTS)) < 1e-5
    policy.change(seed=1)
    push(rollout, policy.payload(ADAPTER, 1))
    assert off(scores(rollout), policy.logps(SEQUENCES, STARTS)) < 1e-5
    read = rollout.call_rank(0, "weights.readback", 1).digests
    assert read == policy.digests(read)

"""Every row of the table in a real engine: ten versions brought in, compared with transformers or, where
vLLM computes in bfloat16 only, with fresh engines. `test_vllm_updates.py` has those of `make test`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.cluster.worker_group import WorkerGroup
from actors.errors import RunFailure, UserError
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.architectures.vllm_table import VLLM_ROWS
from actors.rollout.engine import EngineSpec
from actors.rollout.remote import ROLLOUT
from actors.sync.spec import SlotSpec
from pipeline.artifacts.weights import Weights
from pipeline.execution.slots import slots_of
from tests.actors.rollout.vllm import vllm_cases as cases
from tests.actors.rollout.vllm.slot_engines import SlotPolicy
from tests.actors.rollout.vllm.test_vllm_updates import PROVED
from tests.actors.rollout.vllm.vllm_cases import ADAPTER, MERGED, SEQUENCES, STARTS, Policy, off, scores

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.architectures]

FLOAT32 = [name for name in ARCHITECTURES if "float32" in VLLM_ROWS[name].dtypes]
UNAIDED = "tests.actors.rollout.vllm.vllm_cases"


@pytest.mark.parametrize("architecture", [name for name in FLOAT32 if name not in PROVED])
def test_after_five_adapter_and_five_merged_syncs_the_engine_equals_transformers(
    process: WorkerGroup, base_of: Callable[..., Path], architecture: str
) -> None:
    policy = Policy(base_of(architecture), architecture)
    cases.check_ten_syncs(cases.updatable(process, policy.base), policy)


@pytest.mark.parametrize("kind", [ADAPTER, MERGED])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bfloat16_an_updated_engine_is_exactly_a_fresh_one(
    process: WorkerGroup, base_of: Callable[..., Path], tmp_path: Path, architecture: str, kind: str
) -> None:
    policy = Policy(base_of(architecture, torch.bfloat16), architecture)
    rollout = cases.updatable(process, policy.base, "bfloat16")
    cases.check_fresh_equal(rollout, policy, kind, tmp_path)


@pytest.mark.parametrize("architecture", [name for name in FLOAT32 if VLLM_ROWS[name].slots])
def test_lora_of_every_group_that_the_table_names_comes_in_slots(
    process: WorkerGroup, base_of: Callable[..., Path], architecture: str
) -> None:
    policy = SlotPolicy(base_of(architecture), [g for g in VLLM_ROWS[architecture].slots if g != "experts"])
    process.build(ROLLOUT, EngineSpec(max_num_seqs=16, max_model_len=512)).result()
    room = slots_of(Weights(str(policy.base), None, ""), policy.spec)
    process.call_rank(0, "load", str(policy.base), updatable=True, slots=room, phase="load")
    for version in range(3):
        policy.change(seed=version)
        process.call_rank(0, "weights.stage_payload", policy.staged(version), phase="sync")
        assert process.call_rank(0, "weights.readback", version).digests == policy.slot_digests()
        process.call_rank(0, "weights.commit", version, phase="sync")
        assert off(scores(process), policy.logps(SEQUENCES, STARTS)) < 1e-5


@pytest.mark.parametrize("architecture", [n for n, row in VLLM_ROWS.items() if not row.supports_lora])
def test_an_architecture_without_lora_in_vllm_is_refused_before_the_engine_starts(
    process: WorkerGroup, base_of: Callable[..., Path], architecture: str
) -> None:
    process.build(ROLLOUT, EngineSpec(max_num_seqs=16, max_model_len=512)).result()
    room, base = SlotSpec(600, ("o_proj",)), str(base_of(architecture))
    with pytest.raises(UserError) as refused:
        process.call_rank(0, "load", base, updatable=True, slots=room, phase="load")
    rank, lora = refused.value.problems
    assert "rank 600; a slot of vLLM has 512 at most" in rank
    assert f"vLLM has no LoRA for a {architecture} model" in lora


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in FLOAT32])
def test_a_dtype_that_the_kernels_lack_is_refused_before_vllm_fails_on_it(
    process: WorkerGroup, base_of: Callable[..., Path], architecture: str
) -> None:
    with pytest.raises(UserError, match=rf"float32: vLLM's CPU engine runs {architecture} in bfloat16 only"):
        cases.updatable(process, base_of(architecture))


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        # As DeepSeek's own checkpoints are; vLLM writes another kind of rope into its config.
        ("deepseek_v3", {"rope_parameters": YARN}),
        ("deepseek_v2", {"rope_parameters": YARN, "q_lora_rank": None}),
        ("phimoe", {"lm_head_bias": False}),
    ],
)
def test_variants_of_released_checkpoints_are_right_after_syncs(
    process: WorkerGroup, tmp_path: Path, architecture: str, overrides: dict[str, Any]
) -> None:
    policy = Policy(cases.write_base(tmp_path / "base", architecture, **overrides), architecture)
    rollout = cases.updatable(process, policy.base)
    for version, kind in enumerate((ADAPTER, MERGED)):
        policy.change(seed=version)
        cases.push(rollout, policy.payload(kind, version))
        assert off(scores(rollout), policy.logps(SEQUENCES, STARTS)) < 1e-5


def test_experts_that_the_kernel_pads_are_refused_before_the_first_sync(
    process: WorkerGroup, tmp_path: Path
) -> None:
    base = cases.write_base(tmp_path / "base", "qwen3_moe", moe_intermediate_size=48)
    with pytest.raises(
        UserError, match=r"pads experts of this size .*from \(8, 96, 128\) to \(8, 128, 128\)"
    ):
        cases.updatable(process, base)


# --- Workarounds: each test fails once vLLM no longer needs it -------------------------------------

DROP = (
    "without the workaround '{}' the engine is right: this vLLM no longer needs it. Drop it from "
    "actors/workarounds, from the rows that name it, and here"
)


@contextlib.contextmanager
def still_needed(name: str, reason: str) -> Iterator[None]:
    """Inside, an engine without this workaround fails for this reason."""
    try:
        yield
    except RunFailure as failure:
        assert re.search(reason, str(failure), re.DOTALL), str(failure)  # noqa: PT017
    else:
        pytest.fail(DROP.format(name))


@pytest.mark.parametrize(
    ("engine", "architecture"),
    [("NoRotaryFix", "deepseek_v2"), ("NoRouterBias", "ernie4_5_moe"), ("NoHeadBias", "phimoe")],
)
def test_vllm_still_computes_wrongly_without(
    process: WorkerGroup, base_of: Callable[..., Path], engine: str, architecture: str
) -> None:
    policy = Policy(base_of(architecture), architecture)
    rollout = cases.updatable(process, policy.base, what=f"{UNAIDED}:{engine}")
    (name,) = getattr(cases, engine).without
    assert off(scores(rollout), policy.logps(SEQUENCES, STARTS)) > 1e-3, DROP.format(name)


@pytest.mark.parametrize(
    ("engine", "architecture", "reason"),
    [
        ("NoRouterBias", "minimax_m2", "AssertionError"),
        ("NoNamedLoaders", "minimax_m2", "functools.partial.*__name__"),
        ("NoDbrxNames", "dbrx", "experts.w13_weight"),
    ],
)
def test_vllm_still_fails_without(
    process: WorkerGroup, base_of: Callable[..., Path], engine: str, architecture: str, reason: str
) -> None:
    policy = Policy(base_of(architecture), architecture)
    (name,) = getattr(cases, engine).without
    with still_needed(name, reason):
        scores(cases.updatable(process, policy.base, what=f"{UNAIDED}:{engine}"))


def test_vllm_still_drops_experts_of_a_reloaded_gpt_oss_without(
    process: WorkerGroup, base_of: Callable[..., Path]
) -> None:
    policy = Policy(base_of("gpt_oss"), "gpt_oss")
    policy.change(seed=1)
    rollout = cases.updatable(process, policy.base, what=f"{UNAIDED}:NoGptOssLoaders")
    with still_needed("gpt_oss_loaders", r"bound to no module of the engine: \[.*experts"):
        cases.push(rollout, policy.payload(ADAPTER, 1))

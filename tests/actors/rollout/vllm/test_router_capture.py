"""A real vLLM engine says which experts it chose, and a trainer that replays them agrees with it better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.algorithms.checks import divergence
from actors.batches.batch import Batch
from actors.batches.routed_experts import RoutedExperts
from actors.batches.trajectories import trajectory_batch
from actors.cluster.worker_group import WorkerGroup
from actors.models.architectures.lookup import ARCHITECTURES, architecture_of, replay_problem
from actors.models.lora.adapters import role
from actors.models.moe.router_stats import routers_of
from actors.rollout.engine import EngineSpec, SamplingSpec
from actors.rollout.remote import ROLLOUT
from actors.trainer.model_host import ModelHost
from tests.actors.rollout.sliced import STEP, begin, finish
from tests.actors.rollout.vllm.vllm_cases import ADAPTER, LONG, SEQUENCES, Policy, push, write_base
from tests.actors.trainer.host_cases import LORA, host_spec

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

N = 3
PROMPTS = [LONG, LONG[:150], *SEQUENCES[1:]]
"""The first two share a block of vLLM's prefix cache, beside what the samples of a prompt share."""
SPEC = EngineSpec(max_num_seqs=8, max_model_len=512, kv_cache_gib=0.0025, enable_return_routed_experts=True)
"""Eight sequences of up to three blocks in a cache of 17: some are pushed out and computed again, and slots
change their owners."""
DEEPER = {
    "dots1": {"num_hidden_layers": 6},
    "deepseek_v2": {"num_hidden_layers": 6},
    "ernie4_5_moe": {"num_hidden_layers": 6, "moe_layer_end_index": 5},
}
"""One layer with experts, as of the usual tiny models of these, hardly has two that are nearly as good."""
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ARCHITECTURES
    if replay_problem(name) is None and name != "qwen3_moe"
]


def drawn(engine: WorkerGroup, first_seed: int = 0) -> Batch:
    seeds = list(range(first_seed, first_seed + N * len(PROMPTS)))
    made = engine.call_rank(0, "generate", PROMPTS, SamplingSpec(max_tokens=24, n=N), seeds, phase="generate")
    return trajectory_batch([p for p in PROMPTS for _ in range(N)], made)


def engine_on(process: WorkerGroup, base: Path, dtype: str, layers: int = 2) -> WorkerGroup:
    cache = SPEC.kv_cache_gib * layers / 2
    process.build(ROLLOUT, SPEC.model_copy(update={"dtype": dtype, "kv_cache_gib": cache})).result()
    process.call_rank(0, "load", str(base), updatable=True, phase="load")
    return process


def trainer_on(base: Path, dtype: str) -> ModelHost:
    spec = host_spec(base, lora=LORA)
    moe = spec.model.moe.model_copy(update={"router_replay": "rollout"})
    model = spec.model.model_copy(update={"moe": moe, "dtype": dtype})
    return ModelHost(spec.model_copy(update={"model": model}))


def choices(policy: Policy, ids: np.ndarray, active: str | None) -> np.ndarray:
    """int64 (tokens, layers, top_k): experts that transformers' routers choose."""
    base = policy.peft.get_base_model()
    router = architecture_of(base.config).router
    assert router is not None
    found: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: found.append(router.read(output, 2)[1]))
        for module in routers_of(base, router.module).values()
    ]
    with torch.no_grad(), role(policy.peft, active):
        policy.peft(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    return torch.stack(found, dim=1).numpy()


def assert_chosen_by(policy: Policy, active: str | None, batch: Batch) -> None:
    """At every position of every sample that an engine computes."""
    assert batch.experts is not None
    for row in range(batch.n_rows):
        span = slice(batch.offsets[row], batch.offsets[row + 1])
        own = choices(policy, batch.token_ids[span], active)[:-1]
        theirs = batch.experts[span][:-1].astype(np.int64)
        np.testing.assert_array_equal(np.sort(theirs, axis=-1), np.sort(own, axis=-1), f"row {row}")


@pytest.mark.parametrize("architecture", ["qwen3_moe", *OTHERS])
def test_the_engines_experts_are_those_of_transformers_before_and_after_a_sync(
    process: WorkerGroup, base_of: Callable[..., Path], architecture: str
) -> None:
    base = base_of(architecture, torch.float32)
    policy, engine = Policy(base, architecture), engine_on(process, base, "float32")
    for version in range(2):
        # Before the first sync the engine serves the base.
        active = None if version == 0 else "policy"
        assert_chosen_by(policy, active, drawn(engine, 100 * version))
        policy.change(seed=version)
        push(engine, policy.payload(ADAPTER, version))


def test_samples_that_outlive_a_sync_come_with_the_experts_of_the_new_weights(
    process: WorkerGroup, base_of: Callable[..., Path]
) -> None:
    base = base_of("qwen3_moe", torch.float32)
    policy, engine = Policy(base, "qwen3_moe"), engine_on(process, base, "float32")
    seeds = list(range(len(PROMPTS)))
    begin(engine, 0, PROMPTS, SamplingSpec(max_tokens=24), seeds)
    for _ in range(3):
        first = engine.call_rank(0, "advance", 0, STEP)
        assert not first.ended
    policy.change(seed=3)
    push(engine, policy.payload(ADAPTER, 7), keep=True)
    # One is given back: the others' experts stay theirs.
    made, _ = finish(engine, 0, first, give_back=[len(PROMPTS) - 1])
    batch = trajectory_batch(PROMPTS[:-1], made)
    assert set(made.token_versions.tolist()) == {-1, 7}
    assert_chosen_by(policy, "policy", batch)


@pytest.mark.parametrize("architecture", ["qwen3_moe", *OTHERS])
def test_in_bfloat16_replay_takes_flipped_routes_out_of_the_mismatch(
    process: WorkerGroup, tmp_path: Path, architecture: str
) -> None:
    deeper = DEEPER.get(architecture, {})
    base = write_base(tmp_path, architecture, torch.bfloat16, **deeper)
    engine = engine_on(process, base, "bfloat16", deeper.get("num_hidden_layers", 2))
    trainer = trainer_on(base, "bfloat16")
    batches = [drawn(engine, 100 * turn) for turn in range(3)]
    found = {}
    for name, seen in (("replayed", batches), ("own", [batch.unrouted() for batch in batches])):
        logps = np.concatenate([trainer.scores.token_logprobs(batch, None) for batch in seen])
        engine_logps = np.concatenate([batch.token_columns["engine_logps"] for batch in seen])
        found[name] = divergence(engine_logps, logps)
    agreement = trainer.scores.route_agreement()
    assert agreement is not None
    assert 0.95 < agreement.min() < 1
    assert found["replayed"]["k3"] < 0.7 * found["own"]["k3"], (found, agreement)
    assert found["replayed"]["max"] < 0.5 * found["own"]["max"]


def test_a_batch_with_the_experts_of_other_samples_is_further_off(
    process: WorkerGroup, base_of: Callable[..., Path]
) -> None:
    """That replay helps must come from these experts, not from any."""
    base = base_of("qwen3_moe", torch.float32)
    batch, trainer = drawn(engine_on(process, base, "float32")), trainer_on(base, "float32")
    assert batch.experts is not None
    engine_logps = batch.token_columns["engine_logps"]
    assert divergence(engine_logps, trainer.scores.token_logprobs(batch, None))["max"] < 1e-4
    turned = replace(batch, experts=np.roll(batch.experts, 1, axis=0))
    assert divergence(engine_logps, trainer.scores.token_logprobs(turned, None))["max"] > 1e-1


def test_what_is_joined_is_what_the_engine_gave(process: WorkerGroup, base_of: Callable[..., Path]) -> None:
    engine = engine_on(process, base_of("qwen3_moe", torch.float32), "float32")
    made = engine.call_rank(
        0, "generate", PROMPTS[2:4], SamplingSpec(max_tokens=5, n=1), [1, 2], phase="generate"
    )
    assert made.experts.dtype == np.uint8
    lengths = [len(p) + 5 - 1 for p in PROMPTS[2:4]]
    assert np.diff(made.expert_offsets).tolist() == lengths
    assert isinstance(made.routed_experts, RoutedExperts)

"""One side of rollout.py: the rollout actor as an online stage calls it, or vLLM alone in this process."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from actors.rollout.vllm.settings import TOKENS_PER_STEP
from benchmarks.online_workloads import SAMPLES, WORKLOADS, OnlineWorkload
from benchmarks.turns import Gate

POSITIONS = 1024
Draw = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]
"""(prompt of every sample, its seed) -> token ids of every sample."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("actor", "bare"), required=True)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--engines", type=int, default=1)
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    gate = Gate()
    if args.side == "bare":
        turns(gate, workload, args, bare(workload, args.base, args.threads))
        return
    from actors.cluster import start_ray, stop_ray

    start_ray()
    with tempfile.TemporaryDirectory(prefix="raylign-bench-") as logs:
        try:
            turns(gate, workload, args, actor(workload, args.base, args.threads, args.engines, logs))
        finally:
            stop_ray()


def turns(gate: Gate, workload: OnlineWorkload, args: argparse.Namespace, draw: Draw) -> None:
    """A step's samples a turn; the same on both sides, prompts and seeds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    messages = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in messages]
    turn = 0
    while gate.wait():
        chosen = [prompts[(turn * workload.prompts + i) % len(prompts)] for i in range(workload.prompts)]
        seeds = [turn * 1_000_003 + 7919 * i for i in range(workload.samples)]
        began = time.perf_counter()
        made = draw([prompt for prompt in chosen for _ in range(SAMPLES)], seeds)
        seconds = time.perf_counter() - began
        digest = blake2b(json.dumps(made).encode(), digest_size=8).hexdigest()
        gate.tell({"seconds": seconds, "tokens": sum(map(len, made)), "digest": digest})
        turn += 1


def bare(workload: OnlineWorkload, base: str, threads: int) -> Draw:
    """vLLM's `LLM` in this process: float32, eager, log-probabilities of what is sampled, no text."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1", OMP_NUM_THREADS=str(threads),
        TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=base, dtype="float32", enforce_eager=True, max_model_len=POSITIONS, max_num_seqs=256,
        logprobs_mode="processed_logprobs", distributed_executor_backend="uni",
        # With prompts in chunks its CPU engine fails at seeded samples ("CPU Generator does not use offset").
        enable_chunked_prefill=False, max_num_batched_tokens=TOKENS_PER_STEP,
    )  # fmt: skip

    def draw(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        params = [
            SamplingParams(
                temperature=1.0, max_tokens=workload.limit, seed=seed, logprobs=0, detokenize=False
            )
            for seed in seeds
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return draw


def actor(workload: OnlineWorkload, base: str, threads: int, engines: int, logs: str) -> Draw:
    """The pool, its engines loaded as an online stage loads them."""
    from actors.batches import SamplingSpec
    from actors.cluster import LimitsSpec, RoleSpec
    from actors.rollout.pool import RolloutPool
    from actors.rollout.remote import ROLLOUT, RolloutEngines, rollout_group
    from actors.rollout.spec import EngineSpec
    from actors.sync.engine_set import EngineSet

    role = RoleSpec(workers=engines, threads=threads)
    group = rollout_group(role, LimitsSpec(), logs).start().ready()
    group.build(ROLLOUT, EngineSpec(max_model_len=POSITIONS)).result()
    for loading in [RolloutEngines(group).load(rank, base, updatable=True) for rank in range(engines)]:
        loading.result()

    def replace(rank: int) -> None:
        raise RuntimeError("an engine was lost")

    pool, sampling = (
        RolloutPool(EngineSet(group, replace)),
        SamplingSpec(temperature=1.0, max_tokens=workload.limit),
    )

    def draw(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        made: Any = pool.generate(prompts, sampling, seeds)
        return [ids.tolist() for ids in made.sequences()]

    return draw


if __name__ == "__main__":
    main()

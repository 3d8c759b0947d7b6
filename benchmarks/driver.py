"""Cost of the driver per online step: 1 to 64 rollout actors, 64 to 4,096 samples; then 1,000 engines.

python -m benchmarks.driver            # all of it
python -m benchmarks.driver --only packed    # the second part: 64 to 1,000 engines, 1 and 128 policy ranks
python -m benchmarks.driver --quick    # 1 and 2 actors, 8 packed ones: does it run?

The loop, the pool, the groups and the weight sync are the product's own; engines and trainer are actors that
answer at once (standins.py). So a step's time is the driver's work, Ray's, and copies of the samples. In the
second part many of them share a process (packed.py), and a version has 18,000 tensors.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import Execution, console, rows
from benchmarks.workloads import TRAINED_TINY

ACTORS, SAMPLES = (1, 4, 16, 64), (64, 512, 4096)
GROUP = 8
"""Samples of a prompt."""
PROMPT_TOKENS, ANSWER_TOKENS = 128, 64
STEPS, WARM_UP = 7, 2
PACKED = ((64, 1), (250, 1), (1000, 1), (1000, 128))
"""Engines and policy ranks that share processes."""
SYNC = ("sync/wire", "sync/load", "sync/verify")
PACKED_SAMPLES, PACKED_TENSORS = 1024, 18_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--actors", nargs="+", type=int, default=ACTORS)
    parser.add_argument("--only", choices=("actors", "packed"))
    args = parser.parse_args()
    execution = Execution("driver" if args.only != "packed" else "driver-packed", args.quick)
    found: list[dict[str, Any]] = []
    if args.only != "packed":
        found += measure((1, 2) if args.quick else args.actors, SAMPLES[:2] if args.quick else SAMPLES)
    if args.only != "actors":
        found += measure_packed(((8, 4),) if args.quick else PACKED)
    show(found)
    execution.end([], steps=found)


def measure_packed(sizes: Any) -> list[dict[str, Any]]:
    """Steps with so many engines and policy ranks, in a few processes."""
    from actors.cluster import LimitsSpec, RoleSpec, start_ray, stop_ray
    from benchmarks.packed import PackedGroup

    found: list[dict[str, Any]] = []
    start_ray()
    with tempfile.TemporaryDirectory(prefix="raylign-driver-") as scratch:
        try:
            for n, ranks in sizes:
                policy, rollout = (
                    PackedGroup(name, RoleSpec(workers=workers), LimitsSpec(), scratch).start().ready()
                    for name, workers in (("policy", ranks), ("rollout", n))
                )
                policy.build("benchmarks.standins:Trainer", PACKED_TENSORS).result()
                rollout.build("benchmarks.standins:Engine", ANSWER_TOKENS, PACKED_TENSORS).result()
                found += steps(policy, rollout, PACKED_SAMPLES, Path(scratch))
                for group in (policy, rollout):
                    group.shutdown()
        finally:
            stop_ray()
    return found


def measure(actors: Any, sizes: Any) -> list[dict[str, Any]]:
    """Steps with each number of actors and of samples."""
    from actors.cluster import LimitsSpec, RoleSpec, WorkerGroup, start_ray, stop_ray

    found: list[dict[str, Any]] = []
    limits = LimitsSpec(start=900)
    start_ray()
    with tempfile.TemporaryDirectory(prefix="raylign-driver-") as scratch:
        try:
            policy = WorkerGroup("policy", RoleSpec(), limits, scratch).start().ready()
            policy.build("benchmarks.standins:Trainer").result()
            for n in actors:
                role = RoleSpec(workers=n, cpus=0.01)
                began = time.perf_counter()
                rollout = WorkerGroup("rollout", role, limits, scratch).start().ready()
                rollout.build("benchmarks.standins:Engine", ANSWER_TOKENS).result()
                console.print(f"{n} actors up in {time.perf_counter() - began:.1f} s")
                for samples in sizes:
                    found += steps(policy, rollout, samples, Path(scratch))
                rollout.shutdown()
        finally:
            stop_ray()
    return found


def steps(policy: Any, rollout: Any, samples: int, scratch: Path) -> list[dict[str, Any]]:
    """A few steps of the online loop."""
    from transformers import AutoTokenizer

    from actors.cluster import MeasuredLimits
    from actors.rollout.pool import RolloutPool
    from actors.sync.engine_set import EngineSet
    from actors.sync.spec import SyncSpec
    from actors.sync.weight_sync import WeightSync
    from actors.trainer.remote import ModelWorkers
    from pipeline.stages.context import WorkTime
    from pipeline.stages.online.loop import RlContext, RlLoop
    from pipeline.stages.views import View

    stage = prepared(samples)
    probes = [ids[:33] for ids in stage.data.token_ids[:4]]
    engines = EngineSet(rollout)
    sync = WeightSync(policy, engines, SyncSpec(), "base", "policy", probes)
    view = View(ModelWorkers(policy), "policy")
    ctx = RlContext(
        directory=scratch, identity=None, dtype="float32", logging_steps=1,
        starts_as_reference=True, stop=None, on_step=_nothing, on_log=_nothing,
        limits=MeasuredLimits(rollout.limits), time=WorkTime(),
        policy=view, reference=view, critic=None, reward_models={}, sync=sync,
        rollout=RolloutPool(engines),
        tokenizer=AutoTokenizer.from_pretrained(TRAINED_TINY), note=_nothing,
    )  # fmt: skip
    loop = RlLoop(stage, ctx)
    began = time.perf_counter()
    sync.connect()
    connect = time.perf_counter() - began
    sync.push(0)
    found = []
    for step in range(WARM_UP + STEPS):
        cpu = time.process_time()
        metrics = loop.step(step).metrics
        parts = {name: value for name, value in metrics.items() if name.startswith("time/") or name in SYNC}
        if step >= WARM_UP:
            found.append(
                {"actors": rollout.size, "ranks": policy.size, "samples": samples, "parts": parts,
                 "driver_cpu_seconds": time.process_time() - cpu, "connect_seconds": connect,
                 "driver_bytes": memory_bytes()}
            )  # fmt: skip
    sync.close()
    return found


def memory_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _nothing(*args: Any) -> None:
    return None


def prepared(samples: int) -> Any:
    """A GRPO stage over prompts of equal length."""
    import numpy as np

    from pipeline.data.reading.bad_rows import Skipped
    from pipeline.data.tokens.batch_order import BatchOrder
    from pipeline.data.tokens.prompts import PromptData
    from pipeline.stages.prepared import PreparedRl
    from pipeline.stages.specs.registry import GrpoStage

    spec = GrpoStage(
        data=[{"source": "none.jsonl"}],
        rewards=["benchmarks.standins:reward"],
        batch_size=samples,
        num_generations=GROUP,
        max_completion_length=ANSWER_TOKENS,
    )
    prompts = samples // GROUP
    ids = np.random.default_rng(0).integers(97, 123, size=(prompts, PROMPT_TOKENS)).tolist()
    texts = ["".join(map(chr, row)) for row in ids]
    data = PromptData(list(texts), texts, ids, {}, Skipped(), "none")
    return PreparedRl(
        "grpo", spec, 0, data, BatchOrder(prompts, prompts, 0, max_steps=WARM_UP + STEPS), spec.sampling()
    )


def show(found: list[dict[str, Any]]) -> None:
    """Milliseconds per step, medians, by part."""
    names = [f"time/{part}" for part in ("generate", "rewards", "logprobs", "update")]
    names += [*SYNC, "time/sync", "time/step"]
    lines = []
    for key in dict.fromkeys((one["actors"], one["ranks"], one["samples"]) for one in found):
        same = [one for one in found if (one["actors"], one["ranks"], one["samples"]) == key]

        def middle(name: str, same: list[dict[str, Any]] = same) -> float:
            return 1000 * median(one["parts"].get(name, 0.0) for one in same)

        cpu = 1000 * median(one["driver_cpu_seconds"] for one in same)
        connect = 1000 * same[0]["connect_seconds"]
        memory = max(one["driver_bytes"] for one in same) // 2**20
        label = "{} / {} / {}".format(*key)
        lines.append([label, *map(middle, names), cpu, connect, memory])
    columns = [name.removeprefix("time/").removeprefix("sync/") for name in names]
    rows(
        "Driver: milliseconds per step, medians",
        ["engines / ranks / samples", *columns, "driver's CPU", "connect", "MiB"],
        lines,
    )


if __name__ == "__main__":
    main()

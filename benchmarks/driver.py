"""Cost of the driver per online step, with 1 to 64 rollout actors and 64 to 4,096 samples.

python -m benchmarks.driver            # all of it
python -m benchmarks.driver --quick    # 1 and 2 actors: does it run?

The loop, the pool, the groups and the weight sync are the product's own; engines and trainer are actors that
answer at once (standins.py). So a step's time is the driver's work, Ray's, and copies of the samples.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--actors", nargs="+", type=int, default=ACTORS)
    args = parser.parse_args()
    execution = Execution("driver", args.quick)
    found = measure((1, 2) if args.quick else args.actors, SAMPLES[:2] if args.quick else SAMPLES)
    show(found)
    execution.end([], steps=found)


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

    from actors.rollout.pool import RolloutPool
    from actors.sync.engine_set import EngineSet
    from actors.sync.spec import SyncSpec
    from actors.sync.weight_sync import WeightSync
    from actors.trainer.remote import ModelWorkers
    from pipeline.stages.online.loop import RlContext, RlLoop
    from pipeline.stages.views import View

    stage = prepared(samples)
    probes = [ids[:33] for ids in stage.data.token_ids[:4]]
    engines = EngineSet(rollout)
    sync = WeightSync(policy, engines, SyncSpec(), "base", "policy", probes)
    view = View(ModelWorkers(policy), "policy")
    ctx = RlContext(
        directory=scratch, identity=None, dtype="float32", logging_steps=1,
        starts_as_reference=True, stop_asked=lambda: False, on_step=_nothing, on_log=_nothing,
        policy=view, reference=view, critic=None, reward_models={}, sync=sync,
        rollout=RolloutPool(engines),
        tokenizer=AutoTokenizer.from_pretrained(TRAINED_TINY), note=_nothing,
    )  # fmt: skip
    loop = RlLoop(stage, ctx)
    sync.connect()
    sync.push(0)
    found = []
    for step in range(WARM_UP + STEPS):
        cpu = time.process_time()
        metrics = loop.step(step).metrics
        parts = {name: value for name, value in metrics.items() if name.startswith("time/")}
        if step >= WARM_UP:
            found.append(
                {"actors": rollout.size, "samples": samples, "parts": parts,
                 "driver_cpu_seconds": time.process_time() - cpu}
            )  # fmt: skip
    sync.close()
    return found


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
    names = list(dict.fromkeys(name for one in found for name in one["parts"]))
    lines = []
    for actors, samples in dict.fromkeys((one["actors"], one["samples"]) for one in found):
        same = [one for one in found if (one["actors"], one["samples"]) == (actors, samples)]

        def middle(name: str, same: list[dict[str, Any]] = same) -> float:
            return 1000 * median(one["parts"].get(name, 0.0) for one in same)

        cpu = 1000 * median(one["driver_cpu_seconds"] for one in same)
        per_sample = 1000 * middle("time/step") / samples
        lines.append([f"{actors} actors, {samples} samples", *map(middle, names), cpu, per_sample])
    columns = [name.removeprefix("time/") for name in names]
    rows("Driver: milliseconds per step, medians", ["", *columns, "driver's CPU", "us a sample"], lines)


if __name__ == "__main__":
    main()

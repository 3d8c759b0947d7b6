"""Cost of keeping a rank's state outside of it: CPU seconds per optimizer step, with snapshots and without,
in turns.

python -m benchmarks.snapshots            # LoRA of ranks 8 and 64 on the tiny base, one rank and two
python -m benchmarks.snapshots --quick    # a few steps: does it run?

A step is an update of 64 rows. What is counted is what all ranks and the driver use of the CPU, so that other
work on the machine matters less; snapshots are taken as often as `actors.cluster.snapshots` has it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from benchmarks.figures import Execution, console

TURNS, STEPS, ROWS = 6, 60, 64
CASES = ((8, 1), (64, 1), (8, 2))
"""Rank of the LoRA, workers."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    execution = Execution("snapshots", args.quick)
    found = measure(CASES[:1], 2, 3) if args.quick else measure(CASES, TURNS, STEPS)
    for one in found:
        share = one["with"] / one["without"] - 1
        console.print(
            f"r={one['r']}, {one['workers']} ranks: {one['without'] * 1e3:.1f} ms of CPU per step, with "
            f"snapshots {one['with'] * 1e3:.1f} ({share:+.1%}); {one['taken']} of {one['steps']} steps kept, "
            f"{one['nbytes'] / 1e6:.2f} MB each"
        )
    execution.end([], cases=found)


def measure(cases: Any, turns: int, steps: int) -> list[dict[str, Any]]:
    from actors.cluster import start_ray, stop_ray

    start_ray()
    try:
        with tempfile.TemporaryDirectory(prefix="raylign-snapshots-") as scratch:
            return [case(r, workers, turns, steps, Path(scratch)) for r, workers in cases]
    finally:
        stop_ray()


def case(r: int, workers: int, turns: int, steps: int, scratch: Path) -> dict[str, Any]:
    """Medians over turns, of which every other one takes snapshots."""
    import psutil

    from actors.algorithms.sft import SftLoss
    from actors.cluster import LimitsSpec, RoleSpec
    from actors.cluster.snapshots import Keepers, Snapshots
    from actors.models.spec import LoraSpec, ModelSpec
    from actors.trainer.remote import ModelWorkers, host_group
    from actors.trainer.spec import HostSpec, OptimSpec
    from benchmarks.workloads import TRAINED_TINY

    group = host_group(f"r{r}x{workers}", RoleSpec(workers=workers), LimitsSpec(), scratch).start()
    host = ModelWorkers(group)
    host.build(HostSpec(model=ModelSpec(base=str(TRAINED_TINY), lora=LoraSpec(r=r)))).result()
    host.add_adapter("policy")
    host.prepare_training("policy", OptimSpec(), turns * steps + 1)
    processes = [psutil.Process(pid) for pid in group.pids()] + [psutil.Process()]
    host.update(some_rows(0), SftLoss(), 0).result()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    taken: list[Any] = []
    take, follow = Keepers.take, Snapshots.follow

    def noted(self: Any, whole: bool, number: int) -> Any:
        taken.append(take(self, whole, number))
        return taken[-1]

    with mock.patch.object(Keepers, "take", noted):
        for turn in range(turns):
            on = bool(turn % 2)
            with mock.patch.object(Snapshots, "follow", follow if on else lambda *args: None):
                before = sum(cpu(one) for one in processes)
                for step in range(turn * steps + 1, (turn + 1) * steps + 1):
                    host.update(some_rows(step), SftLoss(), step).result()
                seconds[on].append((sum(cpu(one) for one in processes) - before) / steps)
    facts = host.group.call_rank(0, "kept.take", False)[0]
    group.shutdown()
    return {
        "r": r, "workers": workers, "without": median(seconds[False]), "with": median(seconds[True]),
        "taken": len(taken), "steps": turns // 2 * steps, "nbytes": facts.nbytes,
    }  # fmt: skip


def some_rows(seed: int) -> Any:
    """Random rows of 64 tokens."""
    import numpy as np

    from actors.batches.batch import Batch

    ids = np.random.default_rng(seed).integers(5, 250, size=(ROWS, 64)).tolist()
    return Batch.from_sequences(ids, [[i >= 32 for i in range(64)]] * ROWS)


def cpu(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()

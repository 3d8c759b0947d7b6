"""Generation beside training: steps at staleness 1 against the longer of both, each alone on its own core.

python -m benchmarks.overlap            # staleness 0 and 1 in turns, and samples in flight that are kept
python -m benchmarks.overlap --quick    # one turn on the embedded base: does it run?

Policy and engine have one process of one thread each, pinned to a core of their own in every run, so that at
staleness 0 each is measured alone there; its importance ratios are corrected as those at staleness 1 are, so
that trainers do the same work. Two cores are needed. How much slower a core is while the other one works is
measured beside it, by products of a bare loop: no step can be better than that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import Execution, Ratio, console, rows
from benchmarks.grpo import grpo_config
from benchmarks.online_run import CORES
from benchmarks.online_workloads import WORKLOADS, OnlineWorkload, prepare
from benchmarks.turns import Side

AIM = 1.15
BLOCKS, TURNS, WARM_UP = 3, 3, 2
SIDES: dict[str, dict[str, Any]] = {
    "staleness 0": {"staleness": 0, "vllm_importance_sampling_correction": True},
    "staleness 1": {"staleness": 1},
    "staleness 1, kept": {"staleness": 1, "sync": {"in_flight": "keep"}},
}
KEPT = "staleness 1, kept"
"""Its engine works on when a turn is over, so it has its turns by itself."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workload", choices=WORKLOADS, default="17m")
    args = parser.parse_args()
    execution = Execution("overlap", args.quick)
    workload = WORKLOADS["tiny" if args.quick else args.workload]
    blocks, turns = (1, 1) if args.quick else (BLOCKS, TURNS)
    with tempfile.TemporaryDirectory(prefix="raylign-overlap-") as scratch:
        steps, failed = measure(workload, Path(scratch), blocks, turns)
        both = [together_over_alone(Path(scratch)) for _ in range(blocks)]
    show(steps)
    limit = Ratio("products on both cores at a time / on one alone", both, None, at_most=True)
    execution.end([*ratios_of(steps), limit], workload=workload.name, failed=failed, steps=steps)


def measure(
    workload: OnlineWorkload, scratch: Path, blocks: int, turns: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Steps of all sides; why a side could not be measured."""
    base, prompts = prepare(workload, scratch)
    steps: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        alive = {}
        for name, settings in SIDES.items():
            config = grpo_config(workload, base, prompts, scratch / name.replace(" ", "-"), **settings)
            config["roles"] = {"policy": {"workers": 1}, "rollout": {"workers": 1}}
            path = scratch / f"{name}.yaml"
            path.write_text(json.dumps(config))
            env = {CORES: "policy:0,rollout:1"}
            side = Side(name, ["-m", "benchmarks.online_run", str(path)], env, scratch / f"{name}.log")
            try:
                alive[name] = stack.enter_context(side).ready()
                for _ in range(WARM_UP):
                    side.turn()
            except SystemExit as failure:
                failed[name] = str(failure)[-2000:]
                console.print(f"[red]{name} was not measured[/]: {failed[name]}")
        for block in range(blocks):
            for _ in range(turns):
                steps += [
                    {**alive[name].turn(), "block": block, "side": name} for name in alive if name != KEPT
                ]
                for step in steps[-2:]:
                    say(step)
            if KEPT in alive:
                alive[KEPT].turn()  # begins with an engine that has nothing to do
                for _ in range(turns):
                    steps.append({**alive[KEPT].turn(), "block": block, "side": KEPT})
                    say(steps[-1])
                time.sleep(steps[-1]["seconds"])  # its engine comes to rest
    return steps, failed


PRODUCTS = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
import torch
torch.set_num_threads(1)
weights = [torch.randn(1024, 1024) for _ in range(16)]
rows, ends = torch.randn(256, 1024), time.monotonic() + float(sys.argv[2])
done = 0
while time.monotonic() < ends:
    for w in weights:
        rows @ w
    done += 1
print(done)
"""
"""A bare loop on one core: 64 MiB of weights, as much arithmetic as a forward pass of small batches."""


def together_over_alone(scratch: Path, seconds: float = 4.0) -> float:
    """Time of the bare loop on a core while the other one runs it too, over its time alone."""
    script = scratch / "products.py"
    script.write_text(PRODUCTS)

    def rounds(cores: tuple[int, ...]) -> float:
        running = [
            subprocess.Popen(
                [sys.executable, str(script), str(core), str(seconds)], stdout=subprocess.PIPE, text=True
            )
            for core in cores
        ]
        return sum(int(process.communicate()[0]) for process in running) / len(cores)

    return (rounds((0,)) + rounds((1,))) / 2 / rounds((0, 1))


def say(step: dict[str, Any]) -> None:
    """A line for one step."""
    parts = {
        name.removeprefix("time/"): round(v, 2) for name, v in step["metrics"].items() if "time/" in name
    }
    console.print(f"{step['side']} #{step['block'] + 1}: {parts}")


def _medians(steps: list[dict[str, Any]], side: str, block: int | None = None) -> dict[str, float]:
    """Medians of a side's parts, of one block or all; `train`: all but generation and sync."""
    same = [s for s in steps if s["side"] == side and block in (None, s["block"])]
    if not same:
        return {}
    names = [name for name in same[0]["metrics"] if name.startswith("time/")]
    found = {name.removeprefix("time/"): median(s["metrics"].get(name, 0.0) for s in same) for name in names}
    found["train"] = median(
        s["metrics"]["time/step"] - s["metrics"]["time/generate"] - s["metrics"]["time/sync"] for s in same
    )
    found["tokens"] = median(s["metrics"].get("completions/mean_length", 0.0) for s in same)
    return found


def show(steps: list[dict[str, Any]]) -> None:
    """Medians by part."""
    sides = [name for name in SIDES if any(step["side"] == name for step in steps)]
    each = [_medians(steps, side) for side in sides]
    names = list(dict.fromkeys(name for one in each for name in one))
    lines = [[side, *[one.get(name, 0.0) for name in names]] for side, one in zip(sides, each)]
    rows("A step by part, medians, in s (tokens: mean length)", ["", *names], lines)


def ratios_of(steps: list[dict[str, Any]]) -> list[Ratio]:
    """Block by block: the whole step, sync included, over the longer of generation and training alone."""
    blocks = sorted({step["block"] for step in steps})
    alone = {block: _medians(steps, "staleness 0", block) for block in blocks}
    made = []
    for side, label, aim in (
        ("staleness 1", "step at staleness 1 / max(generate, train)", AIM),
        (KEPT, "the same, samples in flight kept at a sync", AIM),
        ("staleness 0", "step at staleness 0 / max(generate, train)", None),
    ):
        mine = {block: _medians(steps, side, block) for block in blocks}
        if all(mine.values()):
            values = [mine[b]["step"] / max(alone[b]["generate"], alone[b]["train"]) for b in blocks]
            made.append(Ratio(label, values, aim, at_most=True))
    return made


if __name__ == "__main__":
    main()

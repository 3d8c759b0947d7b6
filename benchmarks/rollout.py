"""Generation through the rollout actor against vLLM alone in one process, in turns.

python -m benchmarks.rollout                # on a 59 M-parameter MoE and on the embedded base
python -m benchmarks.rollout --engines 2    # two engines, with half the threads each
python -m benchmarks.rollout --quick        # the embedded base, two turns: does it run?

Both draw the same samples from the same prompts and seeds: the same work, token by token.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import Execution, Ratio, console, rows
from benchmarks.online_workloads import WORKLOADS, OnlineWorkload, prepare
from benchmarks.turns import Side

AIM = 0.95
TURNS = {"60m": 5, "tiny": 12}
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", choices=TURNS, default=list(TURNS))
    args = parser.parse_args()
    execution, found = Execution("rollout", args.quick), []
    with tempfile.TemporaryDirectory(prefix="raylign-rollout-") as scratch:
        for name in ["tiny"] if args.quick else args.workloads:
            found += compare(
                WORKLOADS[name], 2 if args.quick else TURNS[name], args.engines, Path(scratch) / name
            )
    execution.end([ratio for name in TURNS for ratio in ratios_of(name, found)], turns=found)


def compare(workload: OnlineWorkload, turns: int, engines: int, scratch: Path) -> list[dict[str, Any]]:
    """The same samples from both sides, turn by turn."""
    base, prompts = prepare(workload, scratch)
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        sides = []
        for name in ("actor", "bare"):
            threads = workload.threads if name == "bare" else max(1, workload.threads // engines)
            command = [
                "-m", "benchmarks.rollout_side", "--side", name, "--workload", workload.name,
                "--base", str(base), "--prompts", str(prompts), "--threads", str(threads),
                "--engines", str(engines),
            ]  # fmt: skip
            sides.append(stack.enter_context(Side(name, command, {}, scratch / f"{name}.log")).ready())
        for turn in range(-WARM_UP, turns):
            for side in sides if turn % 2 else reversed(sides):
                found.append({"workload": workload.name, "side": side.name, "turn": turn, **side.turn()})
            one, other = found[-2:]
            if one["digest"] != other["digest"]:
                console.print(f"[red]{workload.name} turn {turn}: the sides drew different tokens[/]")
    found = [turn for turn in found if turn["turn"] >= 0]
    lines = []
    for side in ("actor", "bare"):
        same = [turn for turn in found if turn["side"] == side]
        speeds = [turn["tokens"] / turn["seconds"] for turn in same]
        lines.append(
            [side, median(turn["seconds"] for turn in same), median(speeds), min(speeds), max(speeds)]
        )
    rows(f"{workload.name}: {workload.samples} samples", ["side", "s", "tokens/s", "min", "max"], lines)
    return found


def ratios_of(name: str, found: list[dict[str, Any]]) -> list[Ratio]:
    """Speed of the actor over bare vLLM's, turn by turn."""
    by = {(turn["turn"], turn["side"]): turn for turn in found if turn["workload"] == name}
    turns = sorted({turn for turn, _ in by})
    if not turns:
        return []
    wall, cpu = (
        [
            by[t, "actor"]["tokens"] / by[t, "actor"][unit] * by[t, "bare"][unit] / by[t, "bare"]["tokens"]
            for t in turns
        ]
        for unit in ("seconds", "cpu_seconds")
    )
    return [Ratio(f"generation through the actor / bare vLLM, {name}", wall, AIM, cpu=cpu)]


if __name__ == "__main__":
    main()

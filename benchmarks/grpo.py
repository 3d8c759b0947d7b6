"""A GRPO step against TRL's GRPOTrainer, side by side, in turns. See docs/benchmarks.md.

python -m benchmarks.grpo                # on a 59 M-parameter MoE and on the embedded base
python -m benchmarks.grpo --quick        # the embedded base, one turn: does it run?
python -m benchmarks.grpo --tune         # look for TRL's best settings, on answers of 64 tokens at most
python -m benchmarks.grpo --try-vllm     # does TRL's own use of vLLM run here?
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.figures import Execution, Ratio, console, rows
from benchmarks.online_workloads import SAMPLES, WORKLOADS, OnlineWorkload, prepare, run_config
from benchmarks.turns import Side
from benchmarks.workloads import LEARNING_RATE

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
"""For TRL: memory that torch frees stays in the process."""
AIMS = {"60m": 5.0, "tiny": 1.0}
TURNS = {"60m": 3, "tiny": 10}
WARM_UP = {"ours": {"60m": 1, "tiny": 3}, "trl": {"60m": 0, "tiny": 2}}
"""Turns that don't count. A step of TRL's takes minutes on the 60 M base; it is warmed up by less."""
OURS_PER_TURN = {"60m": 2, "tiny": 1}
"""Our steps in one turn, where they are much shorter."""
TUNED: list[dict[str, Any]] = [
    {"per_device_train_batch_size": 64},
    {"per_device_train_batch_size": 16},
    {"per_device_train_batch_size": 8},
    {"use_transformers_continuous_batching": True, "per_device_train_batch_size": 16},
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--try-vllm", action="store_true")
    parser.add_argument("--workloads", nargs="+", choices=AIMS, default=list(AIMS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of TRL")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raylign-grpo-") as scratch:
        if args.tune or args.try_vllm:
            candidates = [{"use_vllm": True, "vllm_mode": "colocate"}] if args.try_vllm else TUNED
            tune(args.workloads, candidates, Path(scratch), args.threads)
            return
        execution = Execution("grpo", args.quick)
        steps: list[dict[str, Any]] = []
        for name in ["tiny"] if args.quick else args.workloads:
            turns = 1 if args.quick else TURNS[name]
            steps += compare(WORKLOADS[name], turns, Path(scratch) / name, args.threads)
        ratios = [ratio for name in AIMS for ratio in ratios_of(name, steps)]
        execution.end(ratios, steps=steps)


def compare(workload: OnlineWorkload, turns: int, scratch: Path, threads: int) -> list[dict[str, Any]]:
    """Steps of both sides, in turns."""
    base, prompts = prepare(workload, scratch)
    found: list[dict[str, Any]] = []
    with ExitStack() as sides:
        ours = sides.enter_context(start_ours(workload, base, prompts, scratch)).ready()
        trl = sides.enter_context(start_trl(workload, base, prompts, scratch, threads, {})).ready()
        for side in (ours, trl):
            for _ in range(WARM_UP[side.name][workload.name]):
                side.turn()
        for turn in range(turns):
            for side in (ours, trl):
                for _ in range(OURS_PER_TURN[workload.name] if side is ours else 1):
                    step = {"workload": workload.name, "side": side.name, "turn": turn, **side.turn()}
                    found.append({**step, "samples": workload.samples})
                    say(found[-1])
    show(workload, found)
    return found


def grpo_config(
    workload: OnlineWorkload, base: Path, prompts: Path, run_dir: Path, **stage: Any
) -> dict[str, Any]:
    """A run of one GRPO stage that outlasts the comparison; `stage`: more fields of the stage."""
    return run_config(
        workload, base, prompts, run_dir, "grpo",
        batch_size=workload.samples, num_generations=SAMPLES, max_steps=1000, save_steps=1000,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", **stage,
    )  # fmt: skip


def start_ours(workload: OnlineWorkload, base: Path, prompts: Path, scratch: Path) -> Side:
    """`raylign run`: all of a step is in it, also checks, metrics, sync and its proof."""
    config = scratch / "run.yaml"
    config.write_text(json.dumps(grpo_config(workload, base, prompts, scratch / "run")))
    return Side("ours", ["-m", "benchmarks.online_run", str(config)], {}, scratch / "ours.log")


def start_trl(
    workload: OnlineWorkload, base: Path, prompts: Path, scratch: Path, threads: int, settings: dict[str, Any]
) -> Side:
    """GRPOTrainer, with an allocator that keeps memory."""
    command = [
        "-m", "benchmarks.grpo_trl", "--workload", workload.name, "--base", str(base),
        "--prompts", str(prompts), "--scratch", str(scratch / "trl"), "--threads", str(threads),
        "--settings", json.dumps(settings),
    ]  # fmt: skip
    env = {**KEEP_MEMORY, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return Side("trl", command, env, scratch / "trl.log")


def tune(names: list[str], candidates: list[dict[str, Any]], scratch: Path, threads: int) -> None:
    """A step of TRL's with each of these settings; short answers on the large base."""
    for name in names:
        workload = WORKLOADS[name]
        base, prompts = prepare(workload, scratch / name)
        for settings in candidates:
            short = {**settings, "max_completion_length": min(workload.limit, 64)}
            micro = short.get("per_device_train_batch_size", 16)
            short["gradient_accumulation_steps"] = workload.samples // micro
            try:
                with start_trl(workload, base, prompts, scratch / name, threads, short) as side:
                    side.ready()
                    console.print(name, settings, end=" ")
                    say(
                        {
                            "workload": name,
                            "side": "trl",
                            "turn": 0,
                            **side.turn(),
                            "samples": workload.samples,
                        }
                    )
            except SystemExit as failure:
                console.print(name, settings, "FAILED", str(failure)[-1500:])


def say(step: dict[str, Any]) -> None:
    """A line for one step."""
    seconds, metrics = step["seconds"], step["metrics"]
    generate = metrics.get("time/generate", float("nan"))
    length = metrics.get("completions/mean_length", float("nan"))
    console.print(
        f"{step['workload']} {step['side']} #{step['turn'] + 1}: {seconds:.2f} s, generation {generate:.2f}, "
        f"{step['samples'] / seconds:.2f} samples/s, mean length {length:.0f}"
    )


def show(workload: OnlineWorkload, steps: list[dict[str, Any]]) -> None:
    """Medians of the parts of a step, by side."""
    from statistics import median

    lines = []
    for side in ("ours", "trl"):
        same = [step for step in steps if step["side"] == side]
        for part in dict.fromkeys(name for step in same for name in step["metrics"]):
            if part.startswith(("time/", "completions/mean_length")):
                lines.append([side, part, median(step["metrics"].get(part, 0.0) for step in same)])
        lines.append([side, "step", median(step["seconds"] for step in same)])
        lines.append([side, "CPU seconds", median(step["cpu_seconds"] for step in same)])
    rows(f"{workload.name}: one step, medians", ["side", "part", "s"], lines)


def ratios_of(name: str, steps: list[dict[str, Any]]) -> list[Ratio]:
    """Samples per second, ours over TRL's, turn by turn; all steps of a turn together."""
    mine = [step for step in steps if step["workload"] == name]
    if not mine:
        return []

    def rate(side: str, turn: int, seconds: str) -> float:
        same = [step for step in mine if (step["side"], step["turn"]) == (side, turn)]
        return sum(step["samples"] for step in same) / sum(step[seconds] for step in same)

    turns = sorted({step["turn"] for step in mine})
    wall, cpu = (
        [rate("ours", turn, seconds) / rate("trl", turn, seconds) for turn in turns]
        for seconds in ("seconds", "cpu_seconds")
    )
    return [Ratio(f"GRPO, samples/s / TRL, {name}", wall, AIMS[name], cpu=cpu)]


if __name__ == "__main__":
    main()

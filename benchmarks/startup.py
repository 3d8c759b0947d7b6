"""From the command to the end of the first training step, by cause; also beside another checkout.

python -m benchmarks.startup                           # SFT, GRPO and the demo's stages, embedded base
python -m benchmarks.startup --against ../old-checkout # the same there, in turns

Every start is a fresh `raylign run` in a fresh run directory. What is read: run.json, the processes' logs
and traces, and /proc at the moment when the first update is done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import Execution, Ratio, console, rows
from benchmarks.processes import tree
from benchmarks.workloads import ROOT, TRAINED_TINY

TIMEOUT_S = 300
POLL_S = 0.02
SHORT_S = 0.05
"""Calls that are shorter stand in the result file only."""

COMMON: dict[str, Any] = {"batch_size": 64, "max_length": 64, "max_steps": 2}


def _rows(split: str) -> dict[str, str]:
    return {"source": "builtin:arithmetic", "split": split}


SFT = {**COMMON, "type": "sft", "data": _rows("train")}
PAIRS = {**COMMON, "data": _rows("preference")}
ONLINE = {**COMMON, "data": _rows("prompts"), "rewards": "exact_match", "max_completion_length": 16}
CASES: dict[str, dict[str, Any]] = {
    "sft": {"sft": SFT},
    "grpo": {"grpo": {**ONLINE, "type": "grpo"}},
    # As the demo: all stages' data is read and checked before the first one trains.
    "demo": {
        "sft": SFT,
        "reward": {**PAIRS, "type": "reward", "eval_data": _rows("test_preference")},
        "dpo": {**PAIRS, "type": "dpo"},
        "ppo": {**ONLINE, "type": "ppo"},
    },
}
"""Stages of each case; what is timed ends with the first update of the first one."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5, help="starts of each")
    parser.add_argument("--quick", action="store_true", help="one start of each")
    args = parser.parse_args()
    execution = Execution("startup", args.quick)
    trees = {"here": ROOT} | ({"against": args.against.resolve()} if args.against else {})
    starts: list[dict[str, Any]] = []
    for case in args.cases:
        for repeat in range(1 if args.quick else args.repeats):
            for name, root in trees.items():
                starts.append({"case": case, "tree": name, "repeat": repeat, **start(case, root)})
                console.print(f"{case} {name} #{repeat + 1}: {starts[-1]['seconds']['total']:.1f} s")
    ratios = []
    for case in args.cases:
        for name in trees:
            show(case, name, [one for one in starts if (one["case"], one["tree"]) == (case, name)])
        if args.against:
            there, here = (
                [one for one in starts if (one["case"], one["tree"]) == (case, name)]
                for name in ("against", "here")
            )
            ratios.append(
                Ratio(
                    f"start-up of {case}: there / here",
                    [a["seconds"]["total"] / b["seconds"]["total"] for a, b in zip(there, here)],
                    2.0,
                    cpu=[
                        sum(a["cpu_seconds"].values()) / sum(b["cpu_seconds"].values())
                        for a, b in zip(there, here)
                    ],
                )
            )
    execution.end(ratios, starts=starts)


def start(case: str, root: Path) -> dict[str, Any]:
    """One run of two steps in the checkout `root`, watched until its first update is done."""
    with tempfile.TemporaryDirectory(prefix="raylign-startup-") as scratch:
        run_dir, config = Path(scratch) / "run", Path(scratch) / "run.yaml"
        config.write_text(json.dumps(_config(case, run_dir)))  # JSON is YAML
        env = {**os.environ, "PYTHONPATH": str(root)}
        env.pop("OMP_NUM_THREADS", None)
        output = (Path(scratch) / "output").open("w+")
        command = [sys.executable, "-m", "pipeline", "run", str(config)]
        began = time.time()
        process = subprocess.Popen(command, cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT)
        seen, cpu = _watch(process, run_dir, began)
        if process.wait(TIMEOUT_S):
            output.seek(0)
            raise SystemExit(f"{case} in {root} failed:\n{output.read()[-4000:]}")
        return _account(run_dir, began, seen, cpu)


def _config(case: str, run_dir: Path) -> dict[str, Any]:
    rollout = {} if case == "sft" else {"rollout": {"workers": 1}}
    return {
        "name": "startup",
        "output_dir": str(run_dir),
        "model": {
            "base": str(TRAINED_TINY),
            "lora": {"r": 16, "lora_alpha": 32, "targets": ["attention", "experts"]},
        },
        "stages": CASES[case],
        "roles": {"policy": {"workers": 2}, **rollout},
    }


def _watch(
    process: subprocess.Popen[Any], run_dir: Path, began: float
) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds at which each log file was there, CPU seconds by process at the first update's end)."""
    seen: dict[str, float] = {}
    trace = run_dir / "logs" / "trace" / "policy-0.jsonl"
    while process.poll() is None and time.time() - began < TIMEOUT_S:
        for log in (run_dir / "logs").glob("*.log"):
            seen.setdefault(log.stem, time.time() - began)
        if trace.is_file() and '"update"' in trace.read_text():
            return seen, _cpu_by_name(process.pid, run_dir)
        time.sleep(POLL_S)
    return seen, {}


def _cpu_by_name(root: int, run_dir: Path) -> dict[str, float]:
    ours = {}
    for log in (run_dir / "logs").glob("*.log"):
        words = log.read_text(errors="replace").split(maxsplit=4)
        if len(words) > 3:
            ours[int(words[3])] = log.stem
    found: dict[str, float] = {}
    for pid, (name, seconds) in tree(root).items():
        label = "driver" if pid == root else ours.get(pid, f"ray: {name}")
        found[label] = round(found.get(label, 0.0) + seconds, 2)
    return found


def _account(run_dir: Path, began: float, seen: dict[str, float], cpu: dict[str, float]) -> dict[str, Any]:
    """Where the time went: of the driver one part after the other, of the processes as moments."""
    state = json.loads((run_dir / "run.json").read_text())
    before = state["began"] - began
    parts = {"interpreter, command line, config": before, **state["startup"]}
    total = parts.pop("first training step") + before
    lines = {
        trace.stem: [json.loads(line) for line in trace.read_text().splitlines()]
        for trace in sorted((run_dir / "logs" / "trace").glob("*.jsonl"))
    }
    until = next(line["end"] for line in lines["policy-0"] if line["phase"] == "update")
    calls = {
        who: [
            [line["method"], round(line["start"] - began, 2), round(line["end"] - began, 2)]
            for line in found
            if line["start"] < until
        ]
        for who, found in lines.items()
    }
    return {"seconds": {**parts, "total": total}, "processes_up": seen, "calls": calls, "cpu_seconds": cpu}


def show(case: str, tree_name: str, found: list[dict[str, Any]]) -> None:
    """Medians over the starts of one case in one checkout."""

    def middle(part: str) -> list[tuple[str, float]]:
        names = dict.fromkeys(name for one in found for name in one[part])
        return [(name, median(one[part].get(name, 0.0) for one in found)) for name in names]

    rows(f"{case}, {tree_name}: the driver's seconds, part by part", ["part", "s"], middle("seconds"))
    rows("processes up at", ["process", "s"], middle("processes_up"))
    first = found[len(found) // 2]["calls"]
    lines = [[f"{who} {method}", a, b, b - a] for who, calls in first.items() for method, a, b in calls]
    longer = [line for line in lines if line[-1] >= SHORT_S]
    rows(
        f"calls of {SHORT_S} s and more until the first update, of one start", ["", "from", "to", "s"], longer
    )
    rows("CPU seconds until the end of the first update", ["process", "s"], middle("cpu_seconds"))


if __name__ == "__main__":
    main()

"""SFT and DPO against TRL and against a bare loop, side by side in one run. See docs/benchmarks.md.

python -m benchmarks.offline            # all of it, three pairs each
python -m benchmarks.offline --quick    # does everything still run? figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.meter import Effort
from benchmarks.workloads import PLAIN, ROOT, WORKLOADS, Workload, write_base

RESULTS = ROOT / "benchmarks" / "results"
SIDES = {
    "sft-tiny": ("ours", "trl-padded", "trl-packed"),
    "dpo-tiny": ("ours", "trl-inline", "trl-precomputed"),
    "sft-120m": ("ours", "trl-padded", "bare", "trl-padded-plain", "trl-packed"),
    "dpo-120m": ("ours", "trl-inline", "bare", "trl-inline-plain", "trl-precomputed"),
}
"""In the order in which they run, over and over."""
ONCE = {("sft-120m", "trl-packed"), ("dpo-120m", "trl-precomputed")}
"""Measured in the first turn only: the slowest to measure, and the farthest from where an aim is at stake."""
QUICK_SIDES = {"sft-tiny": ("ours", "trl-padded", "bare"), "dpo-tiny": ("ours", "trl-precomputed")}
REPEATS = 3
TIMEOUT_S = 1200

EFFORTS = {
    "tiny": Effort(warm_up_steps=3, least_steps=10, least_seconds=5, batches=16),
    "120m": Effort(warm_up_steps=1, least_steps=2, least_seconds=8, batches=3),
}
QUICK = Effort(warm_up_steps=1, least_steps=2, least_seconds=0.5, batches=3)

TUNED: dict[str, list[dict[str, Any]]] = {
    "sft-tiny trl-padded": [{"micro_rows": m, "by_length": b} for m in (64, 32) for b in (True, False)],
    "sft-tiny trl-packed": [{"micro_rows": 1, "bin_length": n} for n in (64, 128, 256, 512)],
    "dpo-tiny trl-inline": [{"micro_rows": m, "by_length": b} for m in (32, 16) for b in (True, False)],
    "sft-120m trl-padded": [{"micro_rows": m, "by_length": b} for m in (16, 8, 4, 2) for b in (True, False)],
    "sft-120m trl-packed": [{"micro_rows": 1, "bin_length": n} for n in (512, 1024, 2048)],
    "dpo-120m trl-inline": [{"micro_rows": m, "by_length": b} for m in (8, 4, 2) for b in (True, False)],
}
"""What `--tune` tries; the best of each stands in trl_side.BEST."""


def main() -> int:
    args = _arguments()
    console = Console(width=120, highlight=False)
    sides = QUICK_SIDES if args.quick else SIDES
    if args.workloads:
        sides = {name: chosen for name, chosen in SIDES.items() if name in args.workloads}
    began = time.time()
    facts = report.machine()
    console.print(f"{facts['cpu']}, {args.threads} threads per side, load {facts['load_average']}")
    with tempfile.TemporaryDirectory(prefix="raylign-bench-") as scratch:
        if args.tune:
            return _tune(Path(scratch), sides, args.threads, console)
        runs: list[report.Run] = []
        bases = {w: write_base(WORKLOADS[w].model, Path(scratch)) for w in sides}
        for workload, chosen in sides.items():
            for repeat in range(1 if args.quick else args.repeats):
                for side in (*chosen, *args.also):
                    if repeat and (workload, side) in ONCE:
                        continue
                    effort = QUICK if args.quick else EFFORTS[WORKLOADS[workload].model]
                    found = _run(WORKLOADS[workload], side, bases[workload], effort, args.threads)
                    runs.append({"workload": workload, "side": side, "repeat": repeat, **found})
                    _say(runs[-1], console)
    report.show(runs, console)
    minutes = (time.time() - began) / 60
    console.print(f"{minutes:.1f} minutes; load {os.getloadavg()[0]:.1f} at the end")
    found = {
        "machine": facts,
        "threads": args.threads,
        "minutes": round(minutes, 1),
        "summary": report.summary(runs),
        "runs": runs,
    }
    _keep(found, "quick" if args.quick else "offline", last=not (args.quick or args.workloads))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of about a minute, tiny base only")
    parser.add_argument("--workloads", nargs="+", choices=SIDES, help="only these")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="pairs of each comparison")
    parser.add_argument("--also", nargs="+", default=[], choices=["ours-without-ray"], help="more sides")
    parser.add_argument("--tune", action="store_true", help="look for TRL's best settings instead")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every side")
    return parser.parse_args()


def _run(
    workload: Workload, side: str, base: Path, effort: Effort, threads: int, settings: Any = None
) -> dict[str, Any]:
    """One side in a fresh process."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [
            sys.executable, "-m", "benchmarks.one", "--workload", workload.name, "--side", side,
            "--base", str(base), "--effort", json.dumps(asdict(effort)), "--threads", str(threads),
            "--settings", json.dumps(settings), "--out", out.name,
        ]  # fmt: skip
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=_environment(side, threads),
            timeout=TIMEOUT_S,
            text=True,
            capture_output=True,
        )
        if done.returncode:
            raise SystemExit(f"{workload.name} {side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return dict(json.loads(Path(out.name).read_text()))


def _environment(side: str, threads: int) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if not side.startswith("ours") and not side.endswith(PLAIN):
        # Memory that torch frees stays in the process instead of being unmapped and faulted in again:
        # up to a third less time. Ours has to see to that by itself.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    return environment


def _tune(scratch: Path, sides: dict[str, tuple[str, ...]], threads: int, console: Console) -> int:
    for case, candidates in TUNED.items():
        workload, side = case.split()
        if workload not in sides:
            continue
        base = write_base(WORKLOADS[workload].model, scratch)
        for settings in candidates:
            effort = EFFORTS[WORKLOADS[workload].model]
            found = _run(WORKLOADS[workload], side, base, effort, threads, settings)
            console.print(settings, end=" ")
            _say({"workload": workload, "side": side, "repeat": 0, **found}, console)
    return 0


def _say(run: report.Run, console: Console) -> None:
    speeds = ", ".join(
        f"{name} {report.rate(run, name):,.0f} tokens/s"
        f" ({report.rate(run, name, 'cpu_seconds'):,.0f} per CPU second)"
        for name in run["readings"]
    )
    peak = run["peak_rss_bytes"] / 2**20
    console.print(f"{run['workload']} {run['side']} #{run['repeat'] + 1}: {speeds}, {peak:,.0f} MiB")


def _keep(found: dict[str, Any], name: str, last: bool) -> None:
    report.write(RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json", found)
    if last:
        report.write(RESULTS / "last.json", found)


if __name__ == "__main__":
    sys.exit(main())

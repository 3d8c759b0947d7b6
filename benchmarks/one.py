"""One side of one workload in a process of its own: `python -m benchmarks.one` (started by offline.py)."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

# Before torch is imported; the same for every side. How threads wait is left to the libraries.
for inherited in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"):
    os.environ.pop(inherited, None)
os.environ.update(
    TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1",
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", DO_NOT_TRACK="1",
)  # fmt: skip

from benchmarks.meter import Effort
from benchmarks.workloads import PLAIN, WORKLOADS

TRL_SIDES = ("trl-padded", "trl-packed", "trl-inline", "trl-precomputed")
SIDES = ("ours", "ours-without-ray", "bare", *TRL_SIDES, *(side + PLAIN for side in TRL_SIDES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--effort", type=json.loads, required=True, help="fields of Effort, as JSON")
    parser.add_argument("--settings", type=json.loads, default=None, help="fields of trl_side.Settings")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    workload, effort = WORKLOADS[args.workload], Effort(**args.effort)
    # Each side imports only its own libraries: they are part of its memory.
    if args.side == "ours":
        from benchmarks.ours import through_actor

        found = through_actor(workload, args.base, effort, args.threads)
    elif args.side == "ours-without-ray":
        from benchmarks.ours import without_ray

        found = without_ray(workload, args.base, effort, args.threads)
    elif args.side == "bare":
        from benchmarks.bare_loop import run as run_bare

        found = run_bare(workload, args.base, effort, args.threads)
    else:
        from benchmarks.trl_side import Settings
        from benchmarks.trl_side import run as run_trl

        settings = Settings(**args.settings) if args.settings else None
        way = args.side.removeprefix("trl-").removesuffix(PLAIN)
        found = run_trl(workload, way, args.base, effort, args.threads, settings)
    found["readings"] = {name: asdict(reading) for name, reading in found["readings"].items()}
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

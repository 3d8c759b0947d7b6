"""Memory of policy, reference, critic and reward model: one process on one base, or a process each.

python -m benchmarks.roles_memory            # on the 124 M base of the other benchmarks
python -m benchmarks.roles_memory --quick    # on the tiny one: does it run?
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
from typing import Any

from benchmarks.meter import peak_rss_bytes
from benchmarks.workloads import ROOT, WORKLOADS, batches, make_rows, write_base

ROLES = ("policy", "reference", "critic", "reward")
PLACEMENTS = {"together": [ROLES], "apart": [(role,) for role in ROLES]}
STEPS = 3
"""Rounds of what an online step asks of each role; the optimizer's moments exist after the first."""
TIMEOUT_S = 900
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="on the tiny base")
    parser.add_argument("--roles", help="internal: be one process with these roles")
    parser.add_argument("--base", type=Path)
    args = parser.parse_args()
    workload = "sft-tiny" if args.quick else "sft-120m"
    if args.roles:
        work(tuple(args.roles.split(",")), workload, args.base)
        return
    with tempfile.TemporaryDirectory() as directory:
        base = write_base(WORKLOADS[workload].model, Path(directory))
        weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        found: dict[str, Any] = {name: measure(groups) for name, groups in placements(args, base)}
    found["base_bytes"] = weights
    for name in PLACEMENTS:
        now, peak = (found[name][kind] / 2**20 for kind in ("resident", "peak"))
        print(f"{name:9} {now:7,.0f} MiB held, {peak:7,.0f} MiB at the peak, base {weights / 2**20:,.0f} MiB")
    if not args.quick:
        (RESULTS / "roles-memory.json").write_text(json.dumps(found, indent=2) + "\n")


def placements(args: argparse.Namespace, base: Path) -> list[tuple[str, list[list[str]]]]:
    """Command lines of the processes of each placement."""
    quick = ["--quick"] if args.quick else []
    start = [sys.executable, "-m", "benchmarks.roles_memory", "--base", str(base), *quick]
    return [
        (name, [[*start, "--roles", ",".join(roles)] for roles in groups])
        for name, groups in PLACEMENTS.items()
    ]


def measure(commands: list[list[str]]) -> dict[str, int]:
    """Bytes of all processes of a placement, while all of them still live.

    `resident` counts a page that several processes map once (Pss); `peak` is the sum of what each had at
    most.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(c, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True) for c in commands]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "done":
                raise RuntimeError(f"{process.args} ended early")
        pids = [process.pid for process in processes]
        return {"resident": sum(map(pss_bytes, pids)), "peak": peak_rss_bytes(pids)}
    finally:
        for process in processes:
            process.kill()
            process.wait(TIMEOUT_S)


def pss_bytes(pid: int) -> int:
    """Memory of a process, its share of shared pages only."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def work(roles: tuple[str, ...], workload: str, base: Path) -> None:
    """One process: what an online stage asks of these roles, then wait to be measured."""
    import numpy as np

    from actors.algorithms.sft import SftLoss
    from actors.algorithms.value import ValueLoss
    from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
    from actors.trainer.model_host import ModelHost
    from actors.trainer.spec import HostSpec, OptimSpec

    model = ModelSpec(base=str(base), lora=LoraSpec(r=16), moe=MoeSpec(router_aux_loss_coef=0.0))
    host = ModelHost(HostSpec(model=model, threads=1))
    for role in roles:
        trains = role in ("policy", "critic")
        host.add_adapter(role, trainable=trains)
        if role in ("critic", "reward"):
            host.add_head(role, "normal")
        if trains:
            host.updates.prepare_training(role, OptimSpec(), STEPS, keep=True)
    todo = WORKLOADS[workload]
    source = batches(todo, make_rows(todo, STEPS * todo.batch_rows, base))
    for step in range(STEPS):
        batch = next(source)
        returns = np.zeros(int(batch.loss_mask.sum()))
        for role in ("policy", "reference"):
            if role in roles:
                host.scores.token_logprobs(batch, role)
        if "reward" in roles:
            host.scores.scores(batch, "reward")
        if "policy" in roles:
            host.updates.update(batch, SftLoss(), step, "policy")
        if "critic" in roles:
            host.scores.values(batch, "critic")
            valued = batch.with_token_columns(returns=returns, old_values=returns)
            host.updates.update(valued, ValueLoss(), step, "critic")
    print("done", flush=True)
    time.sleep(TIMEOUT_S)


if __name__ == "__main__":
    main()

"""Memory of each rank with and without sharding: at loading, and over a few steps; CPU time of the steps.

python -m benchmarks.sharding_memory            # on the 124 M base of the other benchmarks
python -m benchmarks.sharding_memory --quick    # on the tiny one: does it run?
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.workloads import ROOT, WORKLOADS, batches, make_rows, write_base

STEPS = 3
"""The optimizer's moments exist after the first."""
TIMEOUT_S = 900
RESULTS = ROOT / "benchmarks" / "results"
CASES = [(lora, sharding) for lora in (True, False) for sharding in ("none", "base", "full", "experts")]
"""LoRA or every parameter; what the two ranks split. A frozen base alone can be split under LoRA."""

LINE = "{:7} {:9} {:>8} {:>15} {:>8} {:>12} {:>10}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="on the tiny base")
    parser.add_argument("--rank", type=int, help="internal: be this rank")
    parser.add_argument("--case", help="internal: JSON")
    args = parser.parse_args()
    if args.case:
        work(args.rank, **json.loads(args.case))
        return
    workload = "sft-tiny" if args.quick else "sft-120m"
    found = []
    with tempfile.TemporaryDirectory() as directory:
        base = write_base(WORKLOADS[workload].model, Path(directory))
        weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        print(f"base {weights / 2**20:,.0f} MiB; two ranks, MiB of the larger one beyond its imports;")
        print(f"CPU seconds of both in the last {STEPS - 1} steps")
        heads = ("loaded", "loading's peak", "held", "steps' peak", "CPU s")
        print(LINE.format("trains", "sharding", *heads))
        for lora, sharding in CASES:
            if not lora and sharding == "base":
                continue
            ranks = measure(lora, sharding, workload, base)
            row = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
            row["cpu_seconds"] = round(sum(rank["cpu_seconds"] for rank in ranks), 2)
            found.append({"trains": "LoRA" if lora else "all", "sharding": sharding, **row})
            numbers = [f"{row[k] / 2**20:,.0f}" for k in ("loaded", "loading_peak", "held", "steps_peak")]
            cpu = f"{row['cpu_seconds']:.1f}"
            print(LINE.format("LoRA" if lora else "all", sharding, *numbers, cpu), flush=True)
    if not args.quick:
        report = {"base_bytes": weights, "ranks": 2, "rows": found}
        (RESULTS / "sharding-memory.json").write_text(json.dumps(report, indent=2) + "\n")


def measure(lora: bool, sharding: str, workload: str, base: Path) -> list[dict[str, float]]:
    """Bytes and CPU seconds of both ranks."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        init = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    case = {"lora": lora, "sharding": sharding, "workload": workload, "base": str(base), "init": init}
    command = [sys.executable, "-m", "benchmarks.sharding_memory", "--case", json.dumps(case), "--rank"]
    ranks = [
        subprocess.Popen([*command, str(r)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for r in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads(output.splitlines()[-1]) for output in outputs]


class Memory:
    """Anonymous memory of this process, looked at every few milliseconds. Pages of mapped files are left
    out: the kernel drops them when it needs room."""

    def __init__(self) -> None:
        self.start = self.peak = self.now()
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.003)

    def since_start(self) -> tuple[int, int]:
        """(now, at most since the last call), beyond the start."""
        now, peak = self.now(), self.peak
        self.peak = now
        return now - self.start, peak - self.start


def work(rank: int, lora: bool, sharding: Any, workload: str, base: str, init: str) -> None:
    """One rank: load, train some steps, print bytes."""
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401  before counting begins

    from actors.algorithms.sft import SftLoss
    from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
    from actors.trainer.model_host import ModelHost
    from actors.trainer.spec import HostSpec, OptimSpec

    memory = Memory()
    model = ModelSpec(base=base, lora=LoraSpec(r=16) if lora else None, moe=MoeSpec(router_aux_loss_coef=0.0))
    host = ModelHost(HostSpec(model=model, threads=1, sharding=sharding), rank, 2, init)
    loaded, loading_peak = memory.since_start()
    role = "policy" if lora else None
    if role:
        host.add_adapter(role)
    host.updates.prepare_training(role, OptimSpec(), STEPS)
    todo = WORKLOADS[workload]
    source = batches(todo, make_rows(todo, STEPS * todo.batch_rows, Path(base)))
    began = 0.0
    for step in range(STEPS):
        if step == 1:
            began = time.process_time()
        host.updates.update(next(source), SftLoss(), step)
    cpu_seconds = time.process_time() - began
    held, steps_peak = memory.since_start()
    host.close()
    found = {"loaded": loaded, "loading_peak": loading_peak, "held": held, "steps_peak": steps_peak}
    print(json.dumps({**found, "cpu_seconds": cpu_seconds}))


if __name__ == "__main__":
    main()

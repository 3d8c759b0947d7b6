"""Profile of a PPO step: the roles at work at each moment, and the parts of the trainer's update.

python -m benchmarks.profile_ppo            # configs/ppo-tiny.yaml without its SFT, and a 17 M-parameter MoE
python -m benchmarks.profile_ppo --quick    # three steps on the embedded base: does it run?

First a run of `raylign run`: every moment of its steps belongs to the calls that were being answered then, by
the traces of all processes; a moment without any is the driver's and Ray's. Then one update in this process
under torch's profiler, its operators' own CPU time by kind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.figures import Execution, rows
from benchmarks.online_workloads import WORKLOADS, OnlineWorkload, prepare, run_config
from benchmarks.workloads import LORA_ALPHA, LORA_R, ROOT

STEPS, WARM_UP = 8, 2
SAMPLES = {"tiny": 128, "17m": 64, "60m": 64}
TIMEOUT_S = 900
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "aten::baddbmm")),
    ("attention", ("scaled_dot_product", "flash_attention")),
    (
        "gathers, scatters, sorts",
        ("index", "gather", "scatter", "sort", "embedding", "topk", "histc", "cumsum"),
    ),
    ("copies, concatenations, fills", ("copy_", "cat", "clone", "fill_", "zero_", "contiguous", "stack")),
    ("optimizer", ("_fused_adam", "foreach", "Optimizer")),
    ("softmax, norms, reductions", ("softmax", "mean", "sum", "rsqrt", "norm", "logsumexp", "max", "amax")),
    ("elementwise", ("mul", "add", "sub", "div", "silu", "exp", "neg", "pow", "where", "sigmoid", "clamp")),
)
"""By the first kind of which a part is in the operator's name."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workloads", nargs="+", choices=SAMPLES, default=["tiny", "17m"])
    args = parser.parse_args()
    execution, found = Execution("profile-ppo", args.quick), {}
    for name in ["tiny"] if args.quick else args.workloads:
        with tempfile.TemporaryDirectory(prefix="raylign-ppo-") as scratch:
            found[name] = profile(WORKLOADS[name], Path(scratch), 3 if args.quick else STEPS)
        show(name, found[name])
    execution.end([], workloads=found)


def profile(workload: OnlineWorkload, scratch: Path, steps: int) -> dict[str, Any]:
    """Both profiles of one workload."""
    base, prompts = prepare(workload, scratch)
    config = scratch / "run.yaml"
    config.write_text(json.dumps(_config(workload, base, prompts, scratch / "run", steps + WARM_UP)))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(config)],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the run failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    run_dir = scratch / "run"
    metrics = [json.loads(line) for line in (run_dir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    clock: dict[str, float] = defaultdict(float)
    for line in metrics[WARM_UP:]:
        for key in (key for key in line if key.startswith("time/")):
            clock[key] += line[key] / len(metrics[WARM_UP:])
    shares, length = moments(run_dir / "logs" / "trace")
    operators, update = update_by_kind(workload, base)
    return {"clock": dict(clock), "moments": shares, "step_seconds": length, "update": operators,
            "update_cpu_seconds": update, "samples": SAMPLES[workload.name]}  # fmt: skip


def _config(workload: OnlineWorkload, base: Path, prompts: Path, run_dir: Path, steps: int) -> dict[str, Any]:
    return run_config(
        workload, base, prompts, run_dir, "ppo",
        batch_size=SAMPLES[workload.name] // 2, steps_per_generation=2, num_iterations=2, max_steps=steps,
        beta=0.02,
    )  # fmt: skip


def moments(traces: Path) -> tuple[dict[str, float], float]:
    """(seconds per step by who worked at each moment, seconds per step) after the warm-up."""
    calls = []
    for trace in sorted(traces.glob("*.jsonl")):
        role = trace.stem.rpartition("-")[0]
        for line in map(json.loads, trace.read_text().splitlines()):
            # Where roles share processes, the call says whose it is.
            who = "critic" if str(line.get("role", "")).endswith(":critic") else role
            calls.append((line["start"], line["end"], f"{who} {line['method']}"))
    begins = sorted(start for start, _, what in calls if what == "rollout generate")[WARM_UP:]
    first, last = begins[0], begins[-1]
    cuts = sorted({first, last} | {t for a, b, _ in calls for t in (a, b) if first < t < last})
    found: dict[str, float] = defaultdict(float)
    for a, b in itertools.pairwise(cuts):
        working = sorted({what for start, end, what in calls if start < b and end > a})
        found[" + ".join(working) or "nobody: driver and Ray"] += (b - a) / (len(begins) - 1)
    return dict(sorted(found.items(), key=lambda item: -item[1])), (last - first) / (len(begins) - 1)


def update_by_kind(workload: OnlineWorkload, base: Path) -> tuple[dict[str, float], float]:
    """(CPU seconds of one policy update by kind of operator, their sum), on one thread in this process."""
    import numpy as np
    import torch

    from actors.algorithms.policy import PolicyLoss
    from actors.batches import Batch
    from actors.models.spec import LoraSpec, ModelSpec
    from actors.trainer.model_host import ModelHost
    from actors.trainer.spec import HostSpec, OptimSpec

    lora = LoraSpec(r=LORA_R, lora_alpha=LORA_ALPHA, targets=["attention", "experts"])
    host = ModelHost(HostSpec(model=ModelSpec(base=str(base), lora=lora), threads=1))
    host.add_adapter("policy")
    host.updates.prepare_training("policy", OptimSpec(learning_rate=1e-5), 100)
    generator = np.random.default_rng(0)
    samples = SAMPLES[workload.name] // 2
    answers = np.clip(generator.geometric(1 / max(workload.mean, 4.0), samples), 1, workload.limit)
    shortest, longest = workload.prompt_tokens if workload.model else (16, 17)
    prompts = generator.integers(shortest, longest + 1, samples)
    ids = [generator.integers(3, 256, p + a) for p, a in zip(prompts, answers)]
    masks = [np.arange(p + a) >= p for p, a in zip(prompts, answers)]
    batch = Batch.from_sequences(ids, masks)
    logps = host.scores.token_logprobs(batch, "policy")
    batch = batch.with_token_columns(
        old_logps=logps, ref_logps=logps, advantages=generator.normal(size=len(logps)),
        mask=np.ones(len(logps), bool), engine_logps=logps,
    )  # fmt: skip
    batch = batch.with_columns(tokens_per_step=np.full(samples, float(len(logps))))
    loss = PolicyLoss()
    host.updates.update(batch, loss, 0, "policy")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        host.updates.update(batch, loss, 1, "policy")
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next((kind for kind, parts in KINDS if any(part in event.key for part in parts)), "the rest")
        found[kind] += event.self_cpu_time_total / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1])), sum(found.values())


def show(name: str, found: dict[str, Any]) -> None:
    """Three tables."""
    step = found["step_seconds"]
    clock = sorted(found["clock"].items(), key=lambda item: -item[1])
    rows(f"{name}: the driver's clock, means", ["part", "s a step"], clock)
    lines = [[what, s, f"{s / step:.1%}"] for what, s in found["moments"].items() if s / step >= 0.005]
    rows(f"{name}: who works, of {step:.2f} s a step", ["calls", "s", "share"], lines)
    total = found["update_cpu_seconds"]
    lines = [[kind, s, f"{s / total:.1%}"] for kind, s in found["update"].items()]
    rows(
        f"{name}: one policy update of {found['samples'] // 2} samples, one thread",
        ["", "CPU s", "share"],
        lines,
    )


if __name__ == "__main__":
    main()

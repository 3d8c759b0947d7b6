"""A run directory like a real one, with plausible curves, for the report's tests and for looking at it.

`python -m tests.pipeline.report.conftest DIR [whole|failed|bare|online]` writes one and builds its report.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.report.rlhf_run import write_rlhf_run

CONFIG = """\
name: demo
output_dir: runs/demo
seed: 0
model:
  base: assets/tiny-moe
  dtype: float32
  lora:
    r: 16
    lora_alpha: 32.0
    targets: [attention, experts]
stages:
  sft:
    type: sft
    data:
    - source: builtin:arithmetic
      split: train
    batch_size: 64
    max_steps: 150
    learning_rate: 0.002
  dpo:
    type: dpo
    init: sft
    data:
    - source: builtin:arithmetic
      split: preference
    beta: 0.1
    loss_type: [sigmoid]
    batch_size: 64
    max_steps: 100
    learning_rate: 0.0005
roles:
  policy: {workers: 2}
  reference: {workers: 1}
eval:
  data:
  - source: builtin:arithmetic
    split: test
"""

VERSIONS = {
    "raylign": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "peft": "0.21.2",
    "ray": "2.60.0",
}
STARTUP = {
    "ray": 4.2,
    "policy ranks": 9.8,
    "reference": 9.1,
    "vllm_import": 14.6,
    "first training step": 18.4,
}


def write_sample_run(root: Path, *, failed: bool = False, evaluated: bool = True) -> Path:
    """SFT -> DPO; with `failed` DPO broke off at step 43; without `evaluated` there is no eval."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(CONFIG)
    steps = 43 if failed else 100
    write_metrics(root / "sft", 150, sft_row)
    write_metrics(root / "dpo", steps, dpo_row)
    for stage, seconds in (("sft", 48.3), ("dpo", 39.6)):
        if stage == "dpo" and failed:
            continue
        (root / stage / "adapter").mkdir()
        (root / stage / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1_330_000))
        manifest = {"type": "adapter", "stage": stage, "versions": VERSIONS, "seconds": seconds}
        (root / stage / "manifest.json").write_text(json.dumps(manifest))
    run: dict[str, Any] = {
        "name": "demo",
        "stages": {
            "sft": {"state": "done", "seconds": 48.3, "metrics": {"loss": 0.21}},
            "dpo": {"state": "done", "seconds": 39.6, "metrics": {"loss": 0.31}},
        },
        "startup": STARTUP,
        "seconds": 131.0,
        "began": 1791115380.0,
        "versions": VERSIONS,
    }
    if failed:
        reason = "no answer to update(43) in 120 s; the process is gone (exit code -9)"
        run["stages"]["dpo"] = {
            "state": "failed",
            "seconds": 17.0,
            "error": {
                "who": "policy-1",
                "phase": "update",
                "reason": reason,
                "next_step": "run the same command again: it goes on from checkpoint-40",
            },
        }
    if evaluated and not failed:
        run["eval"] = write_completions(root / "eval")
    (root / "run.json").write_text(json.dumps(run, indent=2))
    return root


def write_metrics(stage: Path, steps: int, row: Callable[[float, random.Random], dict[str, float]]) -> None:
    """metrics.jsonl of `steps` rows, and the expert loads at the end."""
    stage.mkdir(parents=True, exist_ok=True)
    noise = random.Random(stage.name)
    lines = []
    for step in range(1, steps + 1):
        figures = row((step - 1) / 99, noise)
        figures |= {
            "step": step,
            "epoch": step / 75,
            "num_tokens": step * 1900,
            "grad_norm": 0.4 + 2.5 * math.exp(-step / 12) + noise.uniform(0, 0.3),
            "learning_rate": 0.002 * min(1, step / 10) * (1 + math.cos(math.pi * step / steps)) / 2,
            "tokens_per_second": noise.gauss(9800, 350),
            "moe/maxvio": 0.55 + noise.gauss(0, 0.03),
            "moe/maxvio_worst": 0.9 + noise.gauss(0, 0.05),
            "moe/dead_experts": 0.0,
            "moe/entropy": 1.86 + noise.gauss(0, 0.01),
        }
        lines.append(json.dumps(figures))
    (stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    load = [[max(0.05, noise.gauss(1, 0.35)) for _ in range(8)] for _ in range(4)]
    (stage / "router_load.json").write_text(json.dumps({"steps": [steps], "load": load}))


def sft_row(at: float, noise: random.Random) -> dict[str, float]:
    loss = 0.22 + 1.5 * math.exp(-5 * at) + noise.gauss(0, 0.03)
    row = {
        "loss": loss,
        "mean_token_accuracy": 1 - loss / 2.6,
        "entropy": loss * 0.9 + noise.uniform(0, 0.05),
    }
    if round(at * 99) % 25 == 24:
        row |= {"eval_loss": loss + 0.03, "eval_mean_token_accuracy": 1 - (loss + 0.03) / 2.6}
    return row


def dpo_row(at: float, noise: random.Random) -> dict[str, float]:
    margin = 3.4 * (1 - math.exp(-3 * at)) + noise.gauss(0, 0.12) * (at > 0)
    return {
        "loss": math.log1p(math.exp(-margin)) + (noise.gauss(0, 0.02) if at else 0),
        "rewards/chosen": 0.3 * margin,
        "rewards/rejected": -0.7 * margin,
        "rewards/margins": margin,
        "rewards/accuracies": min(1.0, 0.5 + 0.14 * margin + noise.gauss(0, 0.03)),
        "logps/chosen": -3.1 + 0.4 * margin,
        "logps/rejected": -4.0 - 7 * margin,
        "logits/chosen": -0.8 + 0.1 * margin,
        "logits/rejected": -0.7 - 0.05 * margin,
        "mean_token_accuracy": 0.9 + 0.02 * margin,
        "entropy": 0.3 + noise.uniform(0, 0.04),
    }


def write_completions(folder: Path, rows: int = 500) -> dict[str, Any]:
    """eval/MODEL.jsonl: sums, of which the later models get more right. Some answers hold markup."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for model, share in (("base", 0.25), ("sft", 0.58), ("dpo", 0.78)):
        sums, lines, right = random.Random(7), [], 0
        for at in range(rows):
            a, b, luck = sums.randint(10, 99), sums.randint(10, 99), sums.random()
            correct = luck < share
            wrong = f"<script>alert({a})</script>" if at % 2 else str(a + b + 10)
            row = {
                "prompt": f"What is {a} + {b}?",
                "completion": str(a + b) if correct else wrong,
                "answer": str(a + b),
                "score": float(correct),
            }
            lines.append(json.dumps(row))
            right += correct
        (folder / f"{model}.jsonl").write_text("\n".join(lines) + "\n")
        p = right / rows
        half = 1.96 * math.sqrt(p * (1 - p) / rows)
        entries[model] = {
            "accuracy": p,
            "n": rows,
            "ci95": [p - half, p + half],
            "metric": "exact_match",
            "seconds": 4.1,
        }
    return entries


def keep_metrics(stage: Path, *names: str) -> None:
    """Leave a stage few metrics: every chart takes a twelfth of a second, and a few are enough."""
    rows = map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
    kept = [{name: row[name] for name in ("step", *names)} for row in rows]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def write_online_run(root: Path) -> Path:
    """SFT -> reward model and GRPO: stage types and metrics that the report does not know."""
    write_sample_run(root, evaluated=False)
    config = CONFIG.replace("type: dpo", "type: reward_model").replace("  dpo:", "  reward:")
    grpo = "  grpo:\n    type: grpo\n    init: sft\n    reference: base\n"
    (root / "config.yaml").write_text(config.replace("roles:\n", f"{grpo}roles:\n"))
    (root / "dpo").rename(root / "reward")

    def grpo_row(at: float, noise: random.Random) -> dict[str, float]:
        return {
            "reward": 0.4 + 0.4 * at + noise.gauss(0, 0.05),
            "kl": 0.02 * at + abs(noise.gauss(0, 0.002)),
            "odd/length": 9 + 3 * at + noise.gauss(0, 0.4),
            "sync/seconds": noise.uniform(0.3, 0.5),
        }

    write_metrics(root / "grpo", 100, grpo_row)
    load = [[max(0.02, random.gauss(1, 0.5)) for _ in range(64)] for _ in range(24)]
    (root / "grpo" / "router_load.json").write_text(json.dumps({"steps": [50, 100], "load": [load, load]}))
    samples = [
        {"step": step, "prompt": f"{step} + 1 = ?", "completion": str(step + 1), "score": 0.5}
        for step in (10, 20)
    ]
    (root / "grpo" / "samples.jsonl").write_text("\n".join(json.dumps(row) for row in samples) + "\n")
    run = json.loads((root / "run.json").read_text())
    run["stages"]["reward"] = run["stages"].pop("dpo")
    run["stages"]["grpo"] = {"state": "running", "seconds": 61.0}
    (root / "run.json").write_text(json.dumps(run))
    return root


@pytest.fixture(scope="session", autouse=True)
def small_pictures() -> Iterator[None]:
    """PNGs of few pixels: a fifth of a report's time is theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.report.figure.PNG_DPI", 60)
        yield


@pytest.fixture
def sample_run(tmp_path: Path) -> Path:
    """A whole SFT -> DPO run with its evaluation."""
    return write_sample_run(tmp_path / "demo")


@pytest.fixture(scope="session")
def reported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report, made once for all tests that only look at it."""
    from pipeline.report import build_report

    root = write_sample_run(tmp_path_factory.mktemp("runs") / "demo")
    assert build_report(root) == root / "report.html"
    return root


@pytest.fixture
def rlhf_run(tmp_path: Path) -> Path:
    """The files of a made-up SFT -> reward model, DPO -> PPO; only PPO has curves."""
    return write_rlhf_run(tmp_path / "synthetic", steps=8, offline=False)


@pytest.fixture
def failed_run(tmp_path: Path) -> Path:
    """A run whose DPO broke off at step 43."""
    root = write_sample_run(tmp_path / "demo", failed=True)
    (root / "sft" / "metrics.jsonl").unlink()
    keep_metrics(root / "dpo", "loss", "rewards/margins")
    return root


@pytest.fixture
def online_run(tmp_path: Path) -> Path:
    """SFT -> reward model and GRPO, the latter still running."""
    root = write_online_run(tmp_path / "demo")
    for stage in ("sft", "reward"):
        (root / stage / "metrics.jsonl").unlink()
    keep_metrics(root / "grpo", "reward", "odd/length")
    return root


if __name__ == "__main__":
    from pipeline.report import build_report

    target, case = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "whole"
    if case == "online":
        write_online_run(target)
    else:
        write_sample_run(target, failed=case == "failed", evaluated=case != "bare")
    print(build_report(target))

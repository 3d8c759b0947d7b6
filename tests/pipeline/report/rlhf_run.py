"""A made-up run of the whole graph (SFT -> reward model, DPO -> PPO): for the report's tests, and to look at.

Every figure is invented. `python -m tests.pipeline.report.rlhf_run DIR` writes it and builds its report.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = 1791115380.0
STEPS = 40
Row = Callable[[float, random.Random], dict[str, float]]

CONFIG = """\
name: synthetic
model: {base: assets/tiny-moe}
stages:
  sft: {type: sft, init: null}
  reward: {type: reward, init: null}
  dpo: {type: dpo, init: null, reference: null}
  ppo:
    type: ppo
    init: null
    reference: sft
    critic_init: null
    rewards:
    - {source: reward, weight: 1.0}
    - {source: exact_match, weight: 0.0}
roles:
  policy: {workers: 2}
  rollout: {workers: 2}
"""


def write_rlhf_run(root: Path, *, steps: int = STEPS, offline: bool = True) -> Path:
    """Write the run; without `offline` only PPO has metrics, and only the usual ones
    (drawing them takes time)."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(CONFIG)
    rows: dict[str, tuple[int, Row]] = {
        "sft": (60, sft_row),
        "reward": (60, reward_row),
        "dpo": (60, dpo_row),
    }
    for stage, (count, row) in {
        **(rows if offline else {}),
        "ppo": (steps, stale_row if offline else ppo_row),
    }.items():
        write_lines(root / stage / "metrics.jsonl", metric_rows(stage, count, row))
    for stage, kind in (
        ("sft", "adapter"),
        ("reward", "reward_model"),
        ("dpo", "adapter"),
        ("ppo", "adapter"),
    ):
        (root / stage / "adapter").mkdir(parents=True)
        (root / stage / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1_330_000))
        (root / stage / "manifest.json").write_text(json.dumps({"type": kind}))
    write_lines(root / "ppo" / "samples.jsonl", sample_rows(steps))
    write_routing(root / "ppo", steps)
    end = write_trace(root / "logs" / "trace", steps)
    write_run_json(root, end - BEGAN)
    return root


def write_run_json(root: Path, seconds: float) -> None:
    shares = {"base": (0.33, 500), "sft": (0.64, 500), "dpo": (0.9, 500), "ppo": (0.97, 500)}
    evals = {name: {**share(p, n), "metric": "exact_match"} for name, (p, n) in shares.items()}
    evals["reward"] = {**share(0.93, 400), "metric": "pair_accuracy"}
    taken = {"sft": 20.6, "reward": 12.1, "dpo": 13.4, "ppo": 150.2}
    stages = {name: {"state": "done", "type": name, "seconds": s, "metrics": {}} for name, s in taken.items()}
    run = {"name": "synthetic", "began": BEGAN, "seconds": seconds, "stages": stages, "eval": evals}
    (root / "run.json").write_text(json.dumps(run))


def share(p: float, n: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    return {"accuracy": p, "n": n, "ci95": [p - half, p + half]}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metric_rows(stage: str, count: int, row: Row) -> list[dict[str, Any]]:
    noise = random.Random(stage)
    return [
        {
            "step": step,
            "epoch": step / count,
            "num_tokens": 1900.0 * step,
            "learning_rate": 1e-3 * (1 - step / (count + 1)),
            "grad_norm": 0.4 + noise.uniform(0, 0.2),
            **row((step - 1) / (count - 1), noise),
        }
        for step in range(1, count + 1)
    ]


def sft_row(at: float, noise: random.Random) -> dict[str, float]:
    return {
        "loss": 0.2 + math.exp(-5 * at) + noise.gauss(0, 0.02),
        "mean_token_accuracy": 0.95 - 0.4 * (1 - at) ** 3,
    }


def reward_row(at: float, noise: random.Random) -> dict[str, float]:
    margin = 3 * at + noise.gauss(0, 0.1)
    return {
        "loss": math.log1p(math.exp(-margin)),
        "accuracy": min(1.0, 0.5 + 0.45 * at + noise.gauss(0, 0.03)),
        "margin": margin,
        "mean_reward": noise.gauss(0, 0.1),
        "min_reward": -2 - 2 * at + noise.gauss(0, 0.2),
        "max_reward": 2 + 2 * at + noise.gauss(0, 0.2),
    }


def dpo_row(at: float, noise: random.Random) -> dict[str, float]:
    margin = 3.4 * (1 - math.exp(-3 * at)) + noise.gauss(0, 0.1) * (at > 0)
    return {
        "loss": math.log1p(math.exp(-margin)),
        "rewards/margins": margin,
        "rewards/chosen": 0.3 * margin,
        "rewards/rejected": -0.7 * margin,
        "rewards/accuracies": min(1.0, 0.5 + 0.15 * margin),
    }


def ppo_row(at: float, noise: random.Random) -> dict[str, float]:
    learnt = 2.6 * (1 - math.exp(-3 * at)) + noise.gauss(0, 0.15)
    times = {
        "generate": 1.5, "rewards": 0.25, "logprobs": 0.5, "update": 1.1, "wait": 0.2, "sync": 0.45
    }  # fmt: skip
    sync = {"gather": 0.02, "pack": 0.03, "wire": 0.06, "load": 0.2, "verify": 0.14}
    seconds = {f"time/{name}": s * noise.uniform(0.9, 1.15) for name, s in times.items()}
    parts = {f"sync/{name}": s * noise.uniform(0.8, 1.3) for name, s in sync.items()}
    return {
        **seconds,
        "time/step": sum(seconds.values()) + 0.1,
        **parts,
        "sync/seconds": sum(parts.values()) + 0.01,
        "sync/version": round(at * STEPS) + 1,
        "sync/bytes": 2_660_000,
        "loss": noise.gauss(0, 0.02),
        "reward": learnt,
        "reward_std": 1.4 - 0.6 * at,
        "rewards/reward/mean": learnt,
        "rewards/reward/std": 1.4 - 0.6 * at,
        "rewards/exact_match/mean": 0.88 + 0.09 * at + noise.gauss(0, 0.015),
        "rewards/exact_match/std": 0.3 - 0.1 * at,
        "kl": 0.012 * at + abs(noise.gauss(0, 0.0008)),
        "entropy": 0.22 - 0.12 * at + noise.gauss(0, 0.008),
        "clip_ratio/low_mean": 0.01 * noise.random(),
        "clip_ratio/high_mean": 0.02 * noise.random(),
        "clip_ratio/region_mean": 0.015 + 0.015 * noise.random(),
        "completions/mean_length": 8 + 2 * at + noise.gauss(0, 0.15),
        "completions/min_length": 4.0,
        "completions/max_length": 14 + round(noise.uniform(0, 3)),
        "completions/clipped_ratio": 0.02 * noise.random(),
        "frac_reward_zero_std": 0.0,
        "value_loss": 0.9 * math.exp(-3 * at) + 0.1,
        "explained_variance": 0.85 * (1 - math.exp(-4 * at)),
        "mismatch/k1": noise.gauss(0, 2e-7),
        "mismatch/k3": 1e-7 * noise.uniform(0.5, 1.5),
        "mismatch/max": 1e-5 * noise.uniform(0.5, 1.5),
        "mismatch/beyond_2x": 0.0,
        "moe/maxvio": 1.2 + noise.gauss(0, 0.03),
        "moe/engine_maxvio": 1.2 + noise.gauss(0, 0.03),
    }


def stale_row(at: float, noise: random.Random) -> dict[str, float]:
    """PPO on samples that are a step old, with router replay and a correction."""
    return {
        **ppo_row(at, noise),
        "mismatch_unreplayed/k3": 4e-6 * noise.uniform(0.5, 1.5),
        "moe/route_agreement": 0.997 + noise.gauss(0, 4e-4),
        "moe/route_agreement_worst": 0.99 + noise.gauss(0, 1e-3),
        "staleness/mean": 1.0 - 0.3 * noise.random(),
        "staleness/max": 1.0 + round(noise.random()),
        "sampling/importance_sampling_ratio/mean": 1 + noise.gauss(0, 0.004),
        "sampling/importance_sampling_ratio/min": 0.6 + noise.gauss(0, 0.05),
        "sampling/importance_sampling_ratio/max": 2 - 0.3 * noise.random(),
        "sampling/sampling_logp_difference/mean": 0.004 * noise.uniform(0.7, 1.3),
        "sampling/sampling_logp_difference/max": 0.4 * noise.uniform(0.7, 1.3),
        "sampling/masked": 0.004 * noise.random(),
    }


def write_routing(stage: Path, steps: int) -> None:
    """Routers of four layers with eight experts; the third layer disagrees most, and less and less."""
    noise = random.Random(11)
    rows = [
        {
            "step": step,
            "trainer": [1.3 + 0.2 * layer + 0.3 * step / steps + noise.gauss(0, 0.03) for layer in range(4)],
            "engines": [1.3 + 0.2 * layer + noise.gauss(0, 0.03) for layer in range(4)],
            "agreement": [
                1 - (0.012 if layer == 2 else 0.002) * (1 - 0.5 * step / steps) * noise.uniform(0.6, 1.2)
                for layer in range(4)
            ],
        }
        for step in range(1, steps + 1)
    ]
    write_lines(stage / "routing.jsonl", rows)
    for name in ("router_load", "engine_load"):
        load = [[round(1000 * noise.uniform(0.3, 1.9)) for _ in range(8)] for _ in range(4)]
        (stage / f"{name}.json").write_text(json.dumps({"load": load}))


def sample_rows(steps: int) -> list[dict[str, Any]]:
    """Four answers to each of three prompts, every tenth step; one holds markup."""
    sums, rows = random.Random(3), []
    for step in range(1, steps + 1, 10):
        for _ in range(3):
            a, b = sums.randint(10, 99), sums.randint(10, 99)
            for slip in (0, 0, 10, -1):
                text = f"{a + b + slip}" if slip >= 0 else "<b>can't say</b>"
                answer = {"prompt": f"What is {a} + {b}?", "completion": text, "answer": str(a + b)}
                rows.append({"step": step, **answer, "reward": 2.1 - 0.3 * abs(slip) + sums.gauss(0, 0.1)})
    return rows


def write_trace(folder: Path, steps: int) -> float:
    """The calls of two policy ranks and two engines; returns when the last one ended."""
    lines: dict[str, list[dict[str, Any]]] = {
        f"{role}-{rank}": [] for role in ("policy", "rollout") for rank in (0, 1)
    }
    now, pace = BEGAN + 4.0, random.Random(5)

    def calls(group: str, method: str, phase: str, seconds: float, **more: Any) -> None:
        nonlocal now
        ends = []
        for rank in (0, 1):
            # Ranks of the policy wait for each other inside the call; engines end on their own.
            own = seconds * (pace.uniform(0.8, 1.15) if group == "rollout" else 1.0)
            lines[f"{group}-{rank}"].append(
                {
                    "method": method,
                    "phase": phase,
                    "start": now,
                    "end": now + own,
                    "peak_rss": round((9e8 if group == "policy" else 1.3e9) + 3e6 * (now - BEGAN)),
                    **more,
                }
            )
            ends.append(now + own)
        now = max(ends) + 0.01

    calls("policy", "build", "load", 3.0)
    for stage_steps in (20, 20, 20):
        for step in range(stage_steps):
            calls("policy", "update", "update", 0.3, step=step)
        calls("policy", "save_adapter", "save", 0.2)
    calls("rollout", "build", "load", 5.0)
    calls("rollout", "load", "load", 3.0)
    for step in range(steps):
        sync(calls)
        calls("rollout", "generate", "generate", 1.5, step=step)
        now += 0.1  # Reward functions, in the driver.
        calls("policy", "token_logprobs", "logprobs", 0.3)
        calls("policy", "values", "logprobs", 0.15, role="critic")
        calls("policy", "scores", "logprobs", 0.15, role="reward")
        calls("policy", "update", "update", 0.8, step=step)
        calls("policy", "update", "update", 0.4, step=step, role="critic")
    sync(calls)
    for _ in range(4):
        calls("rollout", "generate", "generate", 1.8)
    for name, rows in lines.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return now


def sync(calls: Callable[..., None]) -> None:
    calls("policy", "weight_source.prepare", "sync", 0.05)
    calls("policy", "weight_source.send", "sync", 0.06)
    calls("rollout", "stage", "sync", 0.06)
    calls("rollout", "commit", "sync", 0.2)
    calls("rollout", "score_tokens", "sync", 0.08)


if __name__ == "__main__":
    from pipeline.report import build_report

    print(build_report(write_rlhf_run(Path(sys.argv[1]))))

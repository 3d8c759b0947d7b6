"""Conversations with an environment that thinks a tenth of a second a step, against one that answers at once.

python -m benchmarks.environments             # 128 conversations a step on the embedded base, in turns
python -m benchmarks.environments --quick     # one pair of short runs: does it run?

Both draw the same conversations, token by token. No way to draw them takes less than the one that answers at
once, or than the thoughts of the longest conversation; drawn in rounds, each of which waits for all
environments, they take the sum of both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.figures import console, rows
from benchmarks.workloads import ROOT
from examples.second_try import TRIES, SecondTry

THOUGHT_S = 0.1
FIRST = 2
"""Steps that warm up."""


class Thinking(SecondTry):
    """Answers as its parent does, a tenth of a second later."""

    async def step(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, str]], float, bool]:  # type: ignore[override]
        await asyncio.sleep(THOUGHT_S)
        return super().step(messages)


ENVIRONMENTS = {"at once": "examples.second_try:SecondTry", "thinking": "benchmarks.environments:Thinking"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    found: dict[str, list[float]] = {name: [] for name in ENVIRONMENTS}
    samples: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="raylign-environments-") as scratch:
        for turn in range(1 if quick else 3):
            for name, env in list(ENVIRONMENTS.items())[:: 1 if turn % 2 else -1]:
                directory = Path(scratch) / f"{turn}-{name.replace(' ', '-')}"
                found[name] += seconds_of(env, directory, steps=4 if quick else 12)
                samples[name] = (directory / "grpo" / "samples.jsonl").read_text()
    at_once, thinking = (median(found[name]) for name in ENVIRONMENTS)
    thoughts = TRIES * THOUGHT_S
    least, rounds = max(at_once, thoughts), at_once + thoughts
    rows(
        "seconds of a step's conversations",
        ["at once", "thinking", "no way takes less than", "in rounds"],
        [[at_once, thinking, least, rounds]],
    )
    console.print(f"thinking / least: {thinking / least:.2f}, rounds / least: {rounds / least:.2f}")
    if samples["at once"] != samples["thinking"]:
        raise SystemExit("the two drew different conversations")


def seconds_of(env: str, directory: Path, steps: int) -> list[float]:
    """`time/generate` of each step but the first ones."""
    stage = {
        "data": {"source": "builtin:arithmetic", "split": "prompts"}, "env": env, "batch_size": 128,
        "num_generations": 8, "max_steps": steps, "learning_rate": 1e-4, "max_length": 256,
        "max_completion_length": 120,
    }  # fmt: skip
    config = {
        "name": "environments", "output_dir": str(directory), "logging": {"logging_steps": 1},
        "model": {"base": "builtin:tiny-moe", "lora": {"r": 4, "lora_alpha": 8}}, "stages": {"grpo": stage},
    }  # fmt: skip
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    lines = (directory / "grpo" / "metrics.jsonl").read_text().splitlines()
    return [float(json.loads(line)["time/generate"]) for line in lines[FIRST:]]


if __name__ == "__main__":
    main()

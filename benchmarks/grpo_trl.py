"""TRL's side of grpo.py: GRPOTrainer on PEFT and transformers, a step a turn."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import benchmarks.one  # isort: skip  # noqa: F401  sets the environment before torch is imported
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.online_workloads import SAMPLES, WORKLOADS, reward
from benchmarks.trl_side import ALIKE, _lora
from benchmarks.turns import Gate

MICRO_SAMPLES = {"60m": 16, "17m": 16, "tiny": 64}
"""per_device_train_batch_size; found with `grpo.py --tune`."""


class _Turns(TrainerCallback):
    """A gate before each step, the step's time after it."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.trainer = gate, None
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gate.wait():
            sys.exit(0)
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.began
        logged = {name: values[-1] for name, values in self.trainer._metrics["train"].items() if values}
        kept = {name: value for name, value in logged.items() if name.startswith("completions/")}
        self.gate.tell({"seconds": seconds, "metrics": {**kept, **self.trainer.parts}})
        self.trainer.parts.clear()


class Timed(GRPOTrainer):
    """Notes how long generation takes."""

    parts: dict[str, float]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        made = super()._generate_single_turn(*args, **kwargs)
        self.parts["time/generate"] = self.parts.get("time/generate", 0.0) + time.perf_counter() - began
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="fields of GRPOConfig, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    workload = WORKLOADS[args.workload]
    micro = args.settings.get("per_device_train_batch_size", MICRO_SAMPLES[workload.name])
    settings: dict[str, Any] = {
        "output_dir": args.scratch,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": workload.samples // micro,
        "num_generations": SAMPLES,
        "max_completion_length": workload.limit,
        "max_steps": 1_000_000,  # the gate ends it
        "beta": 0.0,
        **ALIKE,
    }
    data = Dataset.from_list([json.loads(line) for line in args.prompts.read_text().splitlines()])
    model = AutoModelForCausalLM.from_pretrained(
        args.base, dtype=torch.float32, experts_implementation="grouped_mm"
    )
    turns = _Turns(Gate())
    trainer = Timed(
        model=model, args=GRPOConfig(**{**settings, **args.settings}), train_dataset=data,
        reward_funcs=reward, peft_config=_lora(), callbacks=[turns],
        processing_class=AutoTokenizer.from_pretrained(args.base),
    )  # fmt: skip
    trainer.parts, turns.trainer = {}, trainer
    if not args.settings.get("use_vllm"):
        _warm_up(trainer.model)
    trainer.train()


def _warm_up(model: Any) -> None:
    """First touches: a few tokens generated, one backward pass; a whole step would take minutes."""
    ids = torch.randint(0, 256, (4, 64))
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


if __name__ == "__main__":
    main()

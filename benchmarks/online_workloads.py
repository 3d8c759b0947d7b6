"""Workloads of the online comparisons: bases, prompts, and lengths of answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import LORA_ALPHA, LORA_R, TRAINED_TINY

SAMPLES = 8
"""Of each prompt."""

MOE_60M: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 224,
    "intermediate_size": 1024,
    "max_position_embeddings": 1024,
}
"""A Qwen3-MoE of 59 M parameters."""
MOE_17M: dict[str, Any] = {**MOE_60M, "num_hidden_layers": 4, "num_experts": 8, "vocab_size": 4096}
CONSTANT = 3.0
"""Beside embeddings of standard deviation 0.02."""
END_OF_TURN = 258
"""Of the byte tokenizer that all these bases have."""


@dataclass(frozen=True)
class OnlineWorkload:
    """Prompts and samples of one step."""

    name: str
    model: dict[str, Any] | None
    """Overrides of the tiny config; None: the embedded base, trained."""
    prompts: int
    """Per step."""
    prompt_tokens: tuple[int, int]
    """Shortest and longest, the chat template's frame included."""
    limit: int
    """New tokens per sample, at most."""
    mean: float
    """New tokens per sample that the base is made to draw: a geometric distribution, cut at the limit."""
    threads: int
    """Of an engine: two are slower than one on products as small as the tiny base's."""

    @property
    def samples(self) -> int:
        return self.prompts * SAMPLES


WORKLOADS = {
    w.name: w
    for w in (
        OnlineWorkload("60m", MOE_60M, 8, (32, 256), 256, 51.0, 2),
        OnlineWorkload("17m", MOE_17M, 8, (32, 128), 128, 40.0, 2),
        OnlineWorkload("tiny", None, 8, (0, 0), 16, 0.0, 1),
    )
}


def prepare(workload: OnlineWorkload, scratch: Path) -> tuple[Path, Path]:
    """The base and a file of prompts."""
    scratch.mkdir(parents=True, exist_ok=True)
    base = write_base(workload, scratch)
    return base, write_prompts(workload, base, scratch / "prompts.jsonl")


def run_config(
    workload: OnlineWorkload, base: Path, prompts: Path, run_dir: Path, kind: str, **stage: Any
) -> dict[str, Any]:
    """A run of one online stage of this kind over the workload; `stage`: more fields of the stage."""
    return {
        "name": f"{kind}-bench",
        "output_dir": str(run_dir),
        "model": {
            "base": str(base),
            "lora": {"r": LORA_R, "lora_alpha": LORA_ALPHA, "targets": ["attention", "experts"]},
        },
        "stages": {
            kind: {
                "data": {"source": str(prompts)},
                "rewards": "benchmarks.online_workloads:reward",
                "max_length": 1024,
                "max_completion_length": workload.limit,
                **stage,
            }
        },
        "roles": {"policy": {"workers": 2}, "rollout": {"threads": workload.threads}},
    }


def write_base(workload: OnlineWorkload, directory: Path) -> Path:
    """The base, with random weights that end a sample after `mean` tokens on average."""
    if workload.model is None:
        return TRAINED_TINY
    from actors.models.tiny import write_tiny_base

    path = write_tiny_base(directory / workload.name, **workload.model)
    _set_end_of_turn(path, 1 / workload.mean)
    return path


def _set_end_of_turn(base: Path, probability: float) -> None:
    """Let each token be followed by the end of the turn with about this probability, whatever came before.

    One hidden number is made nearly the same for all tokens and positions: a large constant in the
    embeddings. The head reads it for the end-of-turn token only, and the routers don't.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = CONSTANT
        model.lm_head.weight[:, 0] = 0.0
        for layer in model.model.layers:
            layer.mlp.gate.weight[:, 0] = 0.0
        ids = torch.randint(0, model.config.vocab_size, (4, 200), generator=generator)
        hidden = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
        logits = hidden @ model.lm_head.weight.T
        others = torch.logsumexp(logits, 1).mean()
        wanted = math.log(probability / (1 - probability)) + float(others)
        model.lm_head.weight[END_OF_TURN] = 0.0
        model.lm_head.weight[END_OF_TURN, 0] = wanted / hidden[:, 0].mean()
    model.save_pretrained(base)


def write_prompts(workload: OnlineWorkload, base: Path, path: Path, n: int = 256) -> Path:
    """A jsonl of `n` conversational prompts, on the embedded base the built-in task with its answers."""
    rows = _task(n) if workload.model is None else _random(workload, n)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _random(workload: OnlineWorkload, n: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    frame = 8  # tokens of the chat template around one message
    shortest, longest = (length - frame for length in workload.prompt_tokens)
    lengths = generator.integers(shortest, longest + 1, size=n)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    texts = ["".join(letters[generator.integers(0, len(letters), size=length)]) for length in lengths]
    return [{"prompt": [{"role": "user", "content": text}], "answer": ""} for text in texts]


def _task(n: int) -> list[dict[str, Any]]:
    from pipeline.data.reading.records import load_records
    from pipeline.data.spec import DataSpec

    source = DataSpec(source="builtin:arithmetic", split="prompts")
    records = load_records([source], "prompt", seed=0, max_rows=n)
    return [{"prompt": list(row.prompt), "answer": row.columns["answer"]} for row in records.rows]


def reward(
    completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], answer: Sequence[str], **columns: Any
) -> list[float]:
    """1 for a right answer; without one, the share of even tokens: something that differs between samples."""
    found = []
    for completion, ids, right in zip(completions, completion_ids, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[0]["content"]
        even = sum(1 for token in ids if token % 2 == 0) / max(1, len(ids))
        found.append(float(text.strip() == right) if right else even)
    return found

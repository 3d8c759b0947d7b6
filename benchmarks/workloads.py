"""Workloads of the comparisons: a base, LoRA settings, rows, and the size of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actors.batches import Batch

ROOT = Path(__file__).resolve().parent.parent
TRAINED_TINY = ROOT / "assets" / "tiny-moe"

LORA_R, LORA_ALPHA = 16, 32
LEARNING_RATE = 1e-4
"""Constant; the value has no influence on speed."""
BETA = 0.1
PLAIN = "-plain"
"""Ending of a side that is measured as a user starts it, without settings of the allocator."""

MEDIUM_MODEL: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 224,
    "intermediate_size": 1024,
}
"""A Qwen3-MoE of 124 M parameters. One expert in 16 acts on a token, as in Qwen3-30B-A3B (8 of 128)."""
PROMPT_MEAN, ANSWER_MEAN = 192, 64
LENGTH_SPREAD = 1 / 3
"""Standard deviation of prompt and answer lengths, as a share of their mean."""


@dataclass(frozen=True)
class Workload:
    """One kind of training on one base."""

    objective: Literal["sft", "dpo"]
    model: Literal["tiny", "120m"]
    batch_rows: int
    """Rows (pairs in DPO) per optimizer step, on every side."""

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.model}"

    @property
    def sequences_per_row(self) -> int:
        return 2 if self.objective == "dpo" else 1


WORKLOADS = {
    w.name: w
    for w in (
        Workload("sft", "tiny", 64),
        Workload("dpo", "tiny", 32),
        Workload("sft", "120m", 16),
        Workload("dpo", "120m", 8),
    )
}


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and its answers: one in SFT, (chosen, rejected) in DPO."""

    prompt: list[int]
    answers: tuple[list[int], ...]

    @property
    def n_tokens(self) -> int:
        """Useful tokens: what a trainer without padding has to read, the prompt once per answer."""
        return sum(len(self.prompt) + len(answer) for answer in self.answers)


def write_base(model: str, directory: Path) -> Path:
    """The base of a workload: the embedded one where it has been trained, else random weights.

    Weights have no influence on speed beyond how the routers spread tokens.
    """
    from actors.models.tiny import write_tiny_base

    if model == "120m":
        return write_tiny_base(directory / model, **MEDIUM_MODEL)
    if (TRAINED_TINY / "model.safetensors").is_file():
        return TRAINED_TINY
    return write_tiny_base(directory / model)


def make_rows(workload: Workload, n: int, base: Path) -> list[Row]:
    """`n` rows: the built-in task on the tiny base, random tokens of random lengths on the other."""
    return _random_rows(workload, n) if workload.model == "120m" else _task_rows(workload, n, base)


def _random_rows(workload: Workload, n: int) -> list[Row]:
    generator = np.random.default_rng(0)

    def tokens(mean: int) -> list[int]:
        length = int(np.clip(generator.normal(mean, mean * LENGTH_SPREAD), mean // 8, 3 * mean))
        return generator.integers(3, MEDIUM_MODEL["vocab_size"], size=length).tolist()

    return [
        Row(tokens(PROMPT_MEAN), tuple(tokens(ANSWER_MEAN) for _ in range(workload.sequences_per_row)))
        for _ in range(n)
    ]


def _task_rows(workload: Workload, n: int, base: Path) -> list[Row]:
    from actors.models.base.loading import load_tokenizer
    from actors.models.spec import ModelSpec
    from pipeline.data.reading.records import load_records
    from pipeline.data.spec import DataSpec
    from pipeline.data.tokens.tokenize import tokenize

    kind: Literal["sft", "preference"] = "preference" if workload.objective == "dpo" else "sft"
    split = "preference" if workload.objective == "dpo" else "train"
    records = load_records([DataSpec(source="builtin:arithmetic", split=split)], kind, seed=0, max_rows=n)
    tokenizer = load_tokenizer(ModelSpec(base=str(base)))
    data = tokenize(
        records, tokenizer, max_length=None, truncation="keep_start", train_on="answer", kind=kind
    )
    whole = data.batch(np.arange(len(records)))
    k, rows = workload.sequences_per_row, []
    for row in range(n):
        sequences = [_split_at_mask(whole, (row % len(records)) * k + i) for i in range(k)]
        rows.append(Row(sequences[0][0], tuple(answer for _, answer in sequences)))
    return rows


def _split_at_mask(batch: Batch, sequence: int) -> tuple[list[int], list[int]]:
    span = slice(int(batch.offsets[sequence]), int(batch.offsets[sequence + 1]))
    ids, cut = batch.token_ids[span].tolist(), int(batch.loss_mask[span].argmax())
    return ids[:cut], ids[cut:]


def batches(workload: Workload, rows: list[Row]) -> Iterator[Batch]:
    """The rows in order, `batch_rows` at a time, over and over; in the product's own form."""
    made = [_batch(rows[i : i + workload.batch_rows]) for i in range(0, len(rows), workload.batch_rows)]
    while True:
        yield from made


def _batch(rows: list[Row]) -> Batch:
    return Batch.from_sequences(
        [row.prompt + answer for row in rows for answer in row.answers],
        [[False] * len(row.prompt) + [True] * len(answer) for row in rows for answer in row.answers],
        len(rows[0].answers),
    )

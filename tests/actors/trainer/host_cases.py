"""Hosts and batches that several tests of the host share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from actors.batches.batch import Batch
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec, Quantization
from actors.trainer.model_host import ModelHost
from actors.trainer.spec import HostSpec

LORA = LoraSpec(r=4, lora_alpha=8, targets=["attention", "experts"])


def host_spec(
    base: Path | str,
    lora: LoraSpec | None = LORA,
    aux: float | None = 0.0,
    quantization: Quantization | None = None,
    **settings: Any,
) -> HostSpec:
    """A float32 host on the CPU without auxiliary loss."""
    moe = MoeSpec(router_aux_loss_coef=aux)
    model = ModelSpec(base=str(base), lora=lora, moe=moe, quantization=quantization)
    return HostSpec(model=model, **settings)


def policy_host(base: Path | str, **settings: Any) -> ModelHost:
    """One rank with a fresh `policy` adapter."""
    host = ModelHost(host_spec(base, **settings))
    host.add_adapter("policy")
    return host


def random_rows(
    n: int, seed: int = 0, shortest: int = 8, longest: int = 40
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids of uneven lengths."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        length = int(generator.integers(shortest, longest))
        cut = int(generator.integers(2, length - 3))
        ids = generator.integers(3, 256, size=length).tolist()
        rows.append((ids[:cut], ids[cut:]))
    return rows


def sft_batch(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """Answers count, prompts don't."""
    return Batch.from_sequences(
        [prompt + answer for prompt, answer in rows],
        [[False] * len(prompt) + [True] * len(answer) for prompt, answer in rows],
    )


def random_pairs(n: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs under TRL's tokenised column names."""
    chosen, rejected = random_rows(n, seed), random_rows(n, seed + 1)
    return [
        {"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad}
        for (prompt, good), (_, bad) in zip(chosen, rejected, strict=True)
    ]


def pair_batch(pairs: list[dict[str, list[int]]], **columns: np.ndarray) -> Batch:
    """Chosen first, then rejected, row by row."""
    sequences, masks = [], []
    for pair in pairs:
        for answer in (pair["chosen_ids"], pair["rejected_ids"]):
            sequences.append(pair["prompt_ids"] + answer)
            masks.append([False] * len(pair["prompt_ids"]) + [True] * len(answer))
    return Batch.from_sequences(sequences, masks, 2, columns)


def with_reference(
    host: ModelHost, batch: Batch, role: str | None = None, ld_alpha: float | None = None
) -> Batch:
    """The batch with the reference's log-probabilities as columns."""
    logps = host.scores.logprobs(batch, role, ld_alpha)
    return batch.with_columns(ref_chosen_logps=logps[0::2], ref_rejected_logps=logps[1::2])

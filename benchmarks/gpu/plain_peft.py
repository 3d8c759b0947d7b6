"""A plain loop over transformers and PEFT: padded rows, W + BA, whole logits, transformers' own loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from actors.batches import Batch
from actors.models.spec import LoraSpec
from benchmarks.gpu.check import Check
from benchmarks.gpu.models import config_directory

IGNORED = -100
"""Label of what counts in no loss, as transformers has it."""


def step_of(check: Check, lora: LoraSpec, batch: Batch, micro: int) -> tuple[float, float | None]:
    """(seconds, peak GiB) of an SFT step over a batch, in padded micro-batches of so many positions."""
    model = _model(check, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    parts = padded(batch, micro)
    labels = sum(int((part["labels"] != IGNORED).sum()) for part in parts)

    def step() -> None:
        for part in parts:
            there = {name: tensor.to(check.device) for name, tensor in part.items()}
            model(**there, use_cache=False, num_items_in_batch=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    check.watch_memory()
    return check.once(step), check.peak_gib()


def _model(check: Check, lora: LoraSpec) -> Any:
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from actors.models.lora.adapter_files import quiet
    from actors.models.lora.adapters import lora_config

    with config_directory(check) as directory, check.device:
        config = AutoConfig.from_pretrained(directory)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    with quiet():
        model = get_peft_model(model, lora_config(model, lora)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def padded(batch: Batch, positions: int) -> list[dict[str, torch.Tensor]]:
    """Rows in order, as many to a micro-batch as the longest of all allows."""
    width = int(batch.lengths.max())
    each = max(1, positions // width)
    found = []
    for first in range(0, batch.n_sequences, each):
        sequences = range(first, min(first + each, batch.n_sequences))
        ids, seen = (np.zeros((len(sequences), width), np.int64) for _ in range(2))
        labels = np.full((len(sequences), width), IGNORED)
        for line, sequence in enumerate(sequences):
            span = slice(int(batch.offsets[sequence]), int(batch.offsets[sequence + 1]))
            length = span.stop - span.start
            ids[line, :length], seen[line, :length] = batch.token_ids[span], 1
            labels[line, :length] = np.where(batch.loss_mask[span], batch.token_ids[span], IGNORED)
        arrays = {"input_ids": ids, "attention_mask": seen, "labels": labels}
        found.append({name: torch.from_numpy(array) for name, array in arrays.items()})
    return found

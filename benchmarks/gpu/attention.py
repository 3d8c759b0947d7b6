"""One layer's attention by sequence: all in one call of torch's varlen attention, or a call for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from actors.batches.attention_plan import AttentionPlan
from actors.models.attention.grouped import GroupedSequences
from actors.models.attention.varlen import VarlenSequences
from benchmarks.gpu.check import Check, Deviation
from benchmarks.gpu.models import settings

ROWS = {"many": (64, 512), "one": (1, 32_768)}
"""Name -> sequences in a row, tokens of each."""
TINY_ROWS = {"many": (4, 16), "one": (1, 64)}
FARTHEST = 0.05
"""Largest mean difference of outputs and gradients, as a share of their mean size: bfloat16 keeps 8 bits."""


def run(check: Check) -> None:
    """Time and memory of forward and backward pass in each form, and how far they are from each other."""
    size = settings(check)
    wrong = []
    for name, (n, length) in check.cases((TINY_ROWS if check.tiny else ROWS).items()):
        plan = AttentionPlan(np.arange(n * length), np.full(n, length), np.zeros(n, dtype=np.int64))
        heads = size["num_attention_heads"], *[size["num_key_value_heads"]] * 2
        inputs = [
            torch.randn(n * length, h, size["head_dim"], device=check.device, dtype=torch.bfloat16)
            for h in heads
        ]
        found: list[list[torch.Tensor]] = []
        # The kernel has no counterpart on the CPU.
        for form in (GroupedSequences, VarlenSequences)[: 1 + check.on_cuda]:
            with check.case(row=name, form=form.__name__):
                sequences = form.of(plan, check.device)
                check.watch_memory()
                seconds = check.seconds(lambda: _pass(sequences, inputs), 3, 1)  # noqa: B023  used here
                found.append(_pass(sequences, inputs))
                off = _off(*found) if len(found) == 2 else None
                check.tell(row=name, form=form.__name__, seconds=seconds, gib=check.peak_gib(), off=off)
                if off is not None and not off <= FARTHEST:
                    wrong.append(f"{name}: {off:.2g}")
    if wrong:
        raise Deviation("; ".join(wrong))


def _pass(sequences: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = sequences.attend(*leaves, 0.0, None, None, None)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


def _off(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Largest of the mean differences, as a share of the mean size."""
    pairs = zip(mine, theirs, strict=True)
    return max(float((a - b).abs().float().mean() / b.abs().float().mean()) for a, b in pairs)

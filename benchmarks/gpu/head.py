"""Log-probabilities from hidden states and the output head, by blocks of several sizes and in one piece."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from actors.algorithms import chunked_logprob
from actors.algorithms.logprob import label_statistics
from benchmarks.gpu.check import Check, Deviation
from benchmarks.gpu.models import settings

BLOCKS = (2**23, 2**25, 2**27, 2**28, 2**29)
"""Logits of one block."""
WHOLE = "whole"
COMPARED = 64
"""Rows that are compared with float32."""
FARTHEST = 0.05
"""Largest mean |difference|: bfloat16 keeps 8 bits of a logit, and these are of size 1."""


def run(check: Check) -> None:
    """Time and memory of forward and backward pass by block, and the distance from float32."""
    size, tokens = settings(check), 128 if check.tiny else 8_192
    hidden, vocabulary = size["hidden_size"], size["vocab_size"]
    weight = 0.02 * torch.randn(vocabulary, hidden, device=check.device, dtype=torch.bfloat16)
    states = torch.randn(tokens, hidden, device=check.device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,), device=check.device)
    few = slice(COMPARED)
    logits = states[few].detach().float() @ weight.float().t()
    exact = torch.log_softmax(logits, -1).gather(1, labels[few, None])[:, 0]
    far = []
    for block in check.cases((*BLOCKS[:2], WHOLE) if check.tiny else (*BLOCKS, WHOLE)):
        with (
            check.case(block=block),
            mock.patch.object(chunked_logprob, "block_elements", return_value=block),
        ):
            logps = _logps(block, weight)
            check.watch_memory()
            seconds = check.seconds(lambda: _pass(logps, states, labels), 3, 1)  # noqa: B023  used here
            off = (logps(states[few], labels[few]).detach() - exact).abs()
            check.tell(
                block=block,
                tokens=tokens,
                vocabulary=vocabulary,
                seconds=seconds,
                floor_s=check.floor_s(4.0 * tokens * hidden * vocabulary),
                gib=check.peak_gib(),
                mean_difference=off.mean().item(),
                largest_difference=off.max().item(),
            )
            far += [] if off.mean() <= FARTHEST else [f"block {block}: {off.mean().item():.2g}"]
    if far:
        raise Deviation("; ".join(far))


Logps = Callable[[Tensor, Tensor], Tensor]


def _logps(block: int | str, weight: Tensor) -> Logps:
    if block == WHOLE:
        return lambda states, labels: label_statistics(states @ weight.t(), labels).logps
    return lambda states, labels: chunked_logprob.head_statistics(states, weight, labels).logps


def _pass(logps: Logps, states: Tensor, labels: Tensor) -> None:
    states.grad = None
    logps(states, labels).sum().backward()

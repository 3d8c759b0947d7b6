"""Rates of this machine's CPU, measured in a second or two with products of a base's own shapes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from actors.models.sizes import BaseSizes

TOKENS, SEQUENCE = 2048, 256
"""Rows of a measured product; tokens of a sequence in measured attention."""
HEAD_ROWS, LOGIT_ROWS = 256, 16
"""Rows of the head's product, and of logits that are turned into probabilities, at one time."""
EXPERTS = 16
"""Experts of a stack, at most, that are measured one after the other: each one's weights come from memory, as
in a layer, and not from the cache."""
SECONDS = 0.4
"""Of each measurement."""
LEAST_ROUNDS = 3
ADDED = 1 << 24
"""Elements of each tensor that is added to measure memory: 64 MiB, beyond any cache."""
LARGEST_WEIGHT = 1 << 25
"""Elements of a measured weight, at most."""


class CpuRates(NamedTuple):
    """Operations, bytes and logits a second."""

    products: float
    attention: float
    bandwidth: float
    logits: float


def measure_cpu(sizes: BaseSizes, threads: int, dtype: str = "float32") -> CpuRates:
    """Rates with so many threads, which torch keeps afterwards as it had them. CPU time where it is of one
    thread, so that other work on the machine counts less. `dtype`: of the base."""
    import torch

    before, kind = torch.get_num_threads(), getattr(torch, dtype)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            products, attention = _products(sizes, threads, kind), _attention(sizes, threads, kind)
            return CpuRates(products, attention, _bandwidth(threads), _logits(sizes.vocabulary, threads))
    finally:
        torch.set_num_threads(before)


def _products(sizes: BaseSizes, threads: int, dtype: torch.dtype) -> float:
    """Over the weights of all layers, each as often as it acts, and the head; experts with as many rows as
    they get. Forward, and for the gradient of the input: the same weight, read the other way round."""
    layer = sizes.layers[len(sizes.layers) // 2]
    head = sizes.vocabulary, sizes.hidden
    found: list[tuple[float, int, int, Sequence[int]]] = [(TOKENS / HEAD_ROWS, HEAD_ROWS, 1, head)]
    for weight in layer.weights:
        if len(weight.shape) < 2 or weight.elements > LARGEST_WEIGHT * max(1, sizes.experts):
            continue
        stack = weight.shape[0] if len(weight.shape) == 3 else 1
        rows = max(1, TOKENS * sizes.top_k // stack) if stack > 1 else TOKENS
        found.append((len(sizes.layers) * stack, rows, min(stack, EXPERTS), weight.shape[-2:]))
    done = seconds = 0.0
    for times, rows, stack, shape in found:
        taken = _seconds_of_products(rows, stack, shape, threads, dtype, SECONDS / len(found))
        done += times * 4.0 * rows * math.prod(shape)
        seconds += times * taken
    return done / seconds


def _seconds_of_products(
    rows: int, stack: int, shape: Sequence[int], threads: int, dtype: torch.dtype, budget: float
) -> float:
    """Of one weight of a stack of this many, both ways."""
    import torch

    weights = torch.randn(stack, *shape, dtype=dtype)
    x, gradient = torch.randn(rows, shape[1], dtype=dtype), torch.randn(rows, shape[0], dtype=dtype)

    def both_ways() -> None:
        for weight in weights:
            torch.mm(x, weight.t())
            torch.mm(gradient, weight)

    return _seconds_of(both_ways, threads, budget) / stack


def _attention(sizes: BaseSizes, threads: int, dtype: torch.dtype) -> float:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    heads, size = sizes.heads, sizes.query_width // sizes.heads
    q, k, v = (torch.randn(1, heads, SEQUENCE, size, dtype=dtype) for _ in range(3))
    taken = _seconds_of(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), threads, SECONDS)
    return 2.0 * SEQUENCE * SEQUENCE / 2 * (sizes.query_width + sizes.value_width) / taken


def _logits(vocabulary: int, threads: int) -> float:
    """That float32 makes probabilities of, with what a loss wants to know of each row; they come from memory
    (`actors.algorithms.logprob` does the same)."""
    import torch

    logits = torch.randn(HEAD_ROWS, vocabulary)

    def probabilities() -> None:
        for block in logits.split(LOGIT_ROWS):
            raised = torch.sub(block, block.amax(-1, keepdim=True)).exp_()
            total = raised.sum(-1, keepdim=True)
            torch.linalg.vecdot(raised, block), torch.linalg.vecdot(raised, raised), block.mean(-1)
            raised.div_(total)

    return logits.numel() / _seconds_of(probabilities, threads, SECONDS / 4)


def _bandwidth(threads: int) -> float:
    """Of an addition that reads two tensors and writes a third."""
    import torch

    a, b, out = torch.ones(ADDED), torch.ones(ADDED), torch.empty(ADDED)
    return 3 * 4 * ADDED / _seconds_of(partial(torch.add, a, b, out=out), threads, SECONDS)


def _seconds_of(work: Callable[[], object], threads: int, seconds: float) -> float:
    """Of one call, in the middle of several."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    work()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < LEAST_ROUNDS or time.perf_counter() < until:
        began = clock()
        work()
        taken.append(clock() - began)
    return statistics.median(taken)

"""Rates of this machine's CPU, measured in a second or two with products of a base's own shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from actors.models.sizes import BaseSizes

TOKENS, SEQUENCE = 1024, 256
"""Rows of a measured product; tokens of a sequence in measured attention."""
SECONDS = 0.4
"""Of each measurement."""
LEAST_ROUNDS = 3
ADDED = 1 << 24
"""Elements of each tensor that is added to measure memory: 64 MiB, beyond any cache."""
LARGEST_WEIGHT = 1 << 25
"""Elements of a measured weight, at most."""


class CpuRates(NamedTuple):
    """Operations and bytes a second."""

    products: float
    attention: float
    bandwidth: float


def measure_cpu(sizes: BaseSizes, threads: int) -> CpuRates:
    """Rates with so many threads, which torch keeps afterwards as it had them. CPU time where it is of one
    thread, so that other work on the machine counts less."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return CpuRates(_products(sizes, threads), _attention(sizes, threads), _bandwidth(threads))
    finally:
        torch.set_num_threads(before)


def _products(sizes: BaseSizes, threads: int) -> float:
    """Over the weights of a middle layer, each as often as it acts; experts with as many rows as they get."""
    import torch

    layer = sizes.layers[len(sizes.layers) // 2]
    done, seconds = 0.0, 0.0
    for weight in layer.weights:
        if len(weight.shape) < 2 or weight.elements > LARGEST_WEIGHT * max(1, sizes.experts):
            continue
        out, width = weight.shape[-2:]
        stacked = len(weight.shape) == 3
        rows = max(1, TOKENS * sizes.top_k // weight.shape[0]) if stacked else TOKENS
        times = sizes.experts if stacked else 1
        x, w = torch.randn(rows, width), torch.randn(out, width)
        taken = _seconds_of(partial(torch.mm, x, w.t()), threads, SECONDS / len(layer.weights))
        done += times * 2.0 * rows * out * width
        seconds += times * taken
    return done / seconds


def _attention(sizes: BaseSizes, threads: int) -> float:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    heads, size = sizes.heads, sizes.query_width // sizes.heads
    q, k, v = (torch.randn(1, heads, SEQUENCE, size) for _ in range(3))
    taken = _seconds_of(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), threads, SECONDS)
    return 2.0 * SEQUENCE * SEQUENCE / 2 * (sizes.query_width + sizes.value_width) / taken


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

"""Python threads that each compute with one thread of torch: for many operations too small to be split.

A product of 256 rows by 512 columns takes a millisecond; split in two, its halves wait for each other every
time, and for a core where another process computes as well. With whole products shared out to threads, the
threads wait once, at the end. torch releases the interpreter's lock while it computes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

# Taken now: vLLM puts a function that does nothing in its place, once it has bound its threads to cores. To
# have one for a while, and then as many as before, leaves them as they are.
from torch import set_num_threads

_POOLS: dict[int, ThreadPoolExecutor] = {}
# Threads don't come along into a forked process, which would wait for them forever.
os.register_at_fork(after_in_child=_POOLS.clear)


def each(items: Sequence[int], work: Callable[[int], None], threads: int | None = None) -> None:
    """Call `work` on every item, in any order, on so many threads (None: as torch has here); without
    gradients.

    What one item's work computes depends neither on the number of threads nor on the order.
    """
    threads = min(threads or torch.get_num_threads(), len(items))
    left = list(reversed(items))

    def run() -> None:
        with torch.no_grad():
            while left:
                try:
                    item = left.pop()
                except IndexError:  # another thread took the last one
                    return
                work(item)

    if threads <= 1:
        run()
        return
    for done in [_pool(threads).submit(run) for _ in range(threads)]:
        done.result()


@contextmanager
def one_thread() -> Iterator[int]:
    """The calling thread computes with one thread of torch; how many it had."""
    before = torch.get_num_threads()
    set_num_threads(1)
    try:
        yield before
    finally:
        set_num_threads(before)


def _pool(threads: int) -> ThreadPoolExecutor:
    if threads not in _POOLS:
        _POOLS[threads] = _started(threads)
    return _POOLS[threads]


def _started(threads: int) -> ThreadPoolExecutor:
    all_up = threading.Barrier(threads + 1)

    def one_thread_each() -> None:
        set_num_threads(1)
        torch.get_num_threads()  # a thread takes over the number that holds when it first asks
        all_up.wait(60)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "raylign-products", initializer=one_thread_each)
    for _ in range(threads):
        pool.submit(all_up.wait, 60)
    all_up.wait(60)  # of the initializers
    all_up.wait(60)  # of the tasks
    # The number is the calling thread's own, but new threads start with the last one that was set.
    set_num_threads(before)
    return pool

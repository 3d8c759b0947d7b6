"""Sleep of an engine that takes turns with a trainer on one device.

On GPUs this is vLLM's sleep of level 1: weights go to the host, the cache is dropped. Level 2 drops the
weights too; a sync loads only what is adapted, so an engine would wake with a base that it has no more.
vLLM's worker on the CPU ignores both levels. There weights are on the host already, the scheduler stops as
it does on GPUs, and the pages of the cache go back to the machine.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from actors.rollout.vllm.worker_calls import ask

if TYPE_CHECKING:
    import torch
    from vllm import LLM

LEVEL = 1


def fall_asleep(llm: LLM) -> None:
    """Stop, and give the device's memory back; nothing may be in flight.

    Raises:
        RuntimeError: something is.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        llm.sleep(level=LEVEL)
        return
    llm.sleep(level=0)
    # Level 0 leaves the blocks of known prompts in place, and what is in them is gone.
    if not llm.reset_prefix_cache():
        raise RuntimeError("samples are still being generated")
    ask(llm, "drop_cache")


def wake(llm: LLM) -> None:
    """Go on, with an empty cache."""
    from vllm.platforms import current_platform

    llm.wake_up(tags=["scheduling"] if current_platform.is_cpu() else None)


def is_asleep(llm: LLM) -> bool:
    """vLLM's own word."""
    return bool(llm.llm_engine.is_sleeping())


def drop_pages(held: Iterable[Any]) -> int:
    """Give the pages that are wholly of these tensors, on the CPU, back to the machine; bytes. The tensors
    stay where they are, and those pages read as zeros.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(held)}
    dropped = 0
    for start, storage in found.items():
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + storage.nbytes() - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length <= 0:
            continue
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")
        dropped += length
    return dropped


def _tensors(held: Iterable[Any]) -> Iterator[torch.Tensor]:
    for one in held:
        if isinstance(one, list | tuple):
            yield from _tensors(one)
        elif one is not None:
            yield one

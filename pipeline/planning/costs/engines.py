"""Bytes of vLLM engines: weights, cache, and what a new version takes while it comes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.rollout.spec import cache_bytes, positions_of

if TYPE_CHECKING:
    from actors.models.facts import BaseSizes
    from actors.rollout.spec import EngineOptions

GIB = 2**30
GPU_WORKSPACE = 2 * GIB
"""Of a GPU engine, inside its share: activations of its largest step, CUDA graphs. Assumed, not measured."""


@dataclass(frozen=True)
class EngineMemory:
    """Of one process of an engine: all of it, or one of its tensor-parallel workers."""

    weights: int
    cache: int
    workspace: int
    reload: int
    """The version that comes in, and the layer that is being rebuilt of it."""
    per_token: int
    """Of the cache, over all workers."""
    positions: int
    """Of the longest prompt and answer."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace + self.reload

    def tokens(self, workers: int = 1) -> int:
        """That the cache holds."""
        return self.cache * workers // self.per_token if self.per_token else 0

    def sequences(self, workers: int = 1) -> int:
        """Of full length that it holds at one time."""
        return self.tokens(workers) // self.positions


def engine_memory(
    sizes: BaseSizes, options: EngineOptions, dtype: str, device_memory: int | None, payload_bytes: int
) -> EngineMemory:
    """Of one process of an engine.

    On a GPU vLLM fills with its cache what weights and workspace leave of `gpu_memory_utilization`; without
    one (`device_memory` None) the cache is as `roles.rollout.engine` says. A layer is rebuilt beside the old
    one at a reload (vllm/model_executor/model_loader/reload). A token's cache is a key and a value per layer
    and cached head (windows of some layers are not taken off).
    """
    element, workers = 4 if dtype == "float32" else 2, options.tensor_parallel_size
    length = positions_of(options.max_model_len, sizes.positions)
    per_token = 2 * len(sizes.layers) * sizes.cached_width * element
    weights = sizes.elements * element // workers
    layer = max((one.elements for one in sizes.layers), default=0) * element // workers
    reload = payload_bytes + layer if payload_bytes else 0
    if device_memory is None:
        cache = cache_bytes(options, per_token, length)
        return EngineMemory(weights, cache, 0, reload, per_token, length)
    inside = int(device_memory * options.gpu_memory_utilization)
    cache = max(0, inside - weights - GPU_WORKSPACE)
    return EngineMemory(weights, cache, GPU_WORKSPACE, reload, per_token, length)

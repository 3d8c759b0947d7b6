"""Settings of a rollout engine, under vLLM's field names where it has one; importable without vLLM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.models.spec import Quantization
from actors.spec import Spec

DEFAULT_POSITIONS = 4096
"""Longest prompt and answer where nothing else is said: long-context models would want tens of GB of
cache."""


def positions_of(asked: int | None, own: int | None) -> int:
    """Positions that an engine holds: `max_model_len` as asked for, within the model's own limit."""
    return min(own or DEFAULT_POSITIONS, asked or DEFAULT_POSITIONS)


FULL_SEQUENCES = 64
MIN_CACHE, MAX_CACHE = 64 * 2**20, 4 * 2**30
"""Key-value cache on the CPU: room for so many sequences of full length, within these bytes. vLLM zeroes it
at the start, which takes 2.3 s per GiB."""


class EngineOptions(Spec):
    """Options of a run for its engines."""

    max_model_len: int | None = Field(default=None, ge=16)
    """Positions of prompt and answer together. Null: the model's own limit, at most 4,096."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Samples generated at the same time."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for keys and values on the CPU. Null: 64 sequences of full length, between 64 MiB and 4 GiB."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that the engine takes."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that one engine is spread over."""
    enforce_eager: bool = False
    """Run without CUDA graphs on GPUs: slower tokens, faster start. On the CPU there are none."""


def cache_bytes(options: EngineOptions, per_token: int, length: int) -> int:
    """Of the key-value cache on the CPU, for sequences of `length` positions of `per_token` bytes."""
    if options.kv_cache_gib is not None:
        return int(options.kv_cache_gib * 2**30)
    sequence = per_token * length
    return max(sequence, min(MAX_CACHE, max(MIN_CACHE, FULL_SEQUENCES * sequence)))


class EngineSpec(EngineOptions):
    """All settings of an engine: the options, and what it shares with the run's model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations in the engine."""
    trust_remote_code: bool = False
    """Allow the base's own Python code."""
    quantization: Quantization | None = None
    """`model.quantization`: the base is served as the trainer computes with it, quantised and dequantised."""
    enable_sleep_mode: bool = False
    """It takes turns with a trainer on its device."""
    enable_return_routed_experts: bool = False
    """Samples of an engine that a trainer keeps up to date come with the experts of every position."""

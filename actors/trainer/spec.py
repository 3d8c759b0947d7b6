"""What a host can be told. Free of torch, so that plans and configurations can use it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.cluster.spec import Sharding
from actors.models.spec import ModelSpec, Spec


class HostSpec(Spec):
    """A model and how one group of ranks runs it."""

    model: ModelSpec
    """The base, its LoRA and its mixture-of-experts settings."""
    packing: Literal["auto"] | bool = "auto"
    """Several sequences in one bin; auto: where the architecture keeps packed sequences apart."""
    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Positions, padding included, of one forward and backward pass per rank."""
    sharding: Sharding = "none"
    """What the ranks of a host split among them (`RoleSpec.sharding`)."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that hold one model together (`RoleSpec.tensor_parallel_size`)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of fresh weights and adapters, and of dropout."""
    device: str = "cpu"
    """torch device of this rank."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of one rank; null: as torch finds them (OMP_NUM_THREADS)."""

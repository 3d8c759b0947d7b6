"""Settings of a weight sync. Free of torch, so that plans and configurations can use it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from actors.spec import Spec

Backend = Literal["gloo", "nccl"]
"""Transport of tensors between trainer and engine: gloo on CPUs, nccl between GPUs."""


def backend_for(trainer_gpus: float, engine_gpus: float) -> Backend:
    """The backend between a trainer and an engine with so many GPUs each."""
    return "nccl" if trainer_gpus > 0 and engine_gpus > 0 else "gloo"


class SyncSpec(Spec):
    """Transport of new weights to the engines, and proof of their arrival."""

    payload: Literal["adapter", "merged"] = "adapter"
    """Content of a sync: LoRA's A and B, merged by the engine into its untouched base, or merged weights."""
    packed_buffer_size_bytes: int = Field(default=2**30, ge=1)
    """Merged weights that are larger are sent in parts of about this size, whole groups of a layer each: the
    first is staged, the others are loaded as they come. Whoever fails after the first has to be replaced, and
    neither side needs room for two models."""
    in_flight: Literal["wait", "keep"] = "wait"
    """Samples in flight for later steps (`staleness` above 0) when new weights come: `wait` until they are
    done, so that a run can be repeated, or `keep` them, so that they go on with the new weights."""
    fan_out: int = Field(default=4, ge=2)
    """Engines that the trainer sends to by itself. Of more, one on each node passes on what it got, to its
    node and to so many other nodes. Merged weights in parts always come from the trainer."""
    probes: int = Field(default=4, ge=1)
    """Sequences whose log-probabilities engine and trainer compare after a sync."""
    probe_tokens: int = Field(default=32, ge=1)
    """Tokens of a probe that are compared."""
    tolerance: float | None = Field(default=None, gt=0)
    """Largest |difference| / max(1, |log-probability|) that nine of ten probe tokens may show between engine
    and trainer (the median: a fifth of it). Null: by the engine's dtype, 1e-4 in float32, 0.6 in bfloat16."""

    @field_validator("payload", mode="before")
    @classmethod
    def _no_slots(cls, value: Any) -> Any:
        if value == "lora":
            raise ValueError(
                "vLLM's own LoRA slots are no payload: its experts don't run with them on the CPU (they need "
                "Triton), and on GPUs it was not tried; `adapter` sends the same bytes, and the engine merges"
            )
        return value

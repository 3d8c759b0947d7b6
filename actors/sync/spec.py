"""Settings of a weight sync. Free of torch, so that plans and configurations can use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from actors.spec import Spec
from actors.sync.relay_tree import TOP

Backend = Literal["gloo", "nccl", "shared", "ipc"]
"""Transport of tensors between trainer and engine: gloo on CPUs, nccl between GPUs; where both are on one
device, `shared` memory of the machine on CPUs and `ipc`, CUDA's handles of device memory, on a GPU."""


@dataclass(frozen=True)
class Backends:
    """Transports of the connections of a group."""

    between: Backend = "gloo"
    nearest: Backend | None = None
    """Between the trainer's first rank and the first engine, where both are on one device."""

    def of(self, engine: int, sender: int) -> Backend:
        """Transport to an engine; `sender`: as in `relay_tree`."""
        if self.nearest is not None and (engine, sender) == (0, TOP):
            return self.nearest
        return self.between


OVER_GLOO = Backends()


def backends_for(trainer_gpus: float, engine_gpus: float, one_device: bool = False) -> Backends:
    """Transports between a trainer and engines with so many GPUs each; `one_device`: engine i takes turns
    with rank i on its device. Other engines than the first may be on other nodes."""
    nearest: Backend = "ipc" if trainer_gpus > 0 else "shared"
    return Backends(backend_for(trainer_gpus, engine_gpus), nearest if one_device else None)


def backend_for(trainer_gpus: float, engine_gpus: float) -> Backend:
    """The backend between a trainer and an engine with so many GPUs each, on devices of their own."""
    return "nccl" if trainer_gpus > 0 and engine_gpus > 0 else "gloo"


class SyncSpec(Spec):
    """Transport of new weights to the engines, and proof of their arrival."""

    payload: Literal["adapter", "merged", "lora"] = "adapter"
    """Content of a sync: LoRA's A and B, merged by the engine into its untouched base; merged weights; or A
    and B for a LoRA slot of vLLM, beside the base, which is left as it is."""
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


SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank` (config/lora.py): a slot has room for one of these."""


@dataclass(frozen=True)
class SlotSpec:
    """Room that an engine keeps for LoRA beside its base."""

    rank: int
    """Largest rank of an adapter."""
    modules: tuple[str, ...]
    """Last parts of the adapted modules' names in a checkpoint; no other module gets room."""

    @property
    def max_lora_rank(self) -> int | None:
        """The smallest of `SLOT_RANKS` that is enough, or None."""
        return next((room for room in SLOT_RANKS if room >= self.rank), None)

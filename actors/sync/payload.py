"""Payload of a weight sync: a manifest, and one buffer with all tensors.

Invariants: a payload's bytes are a function of the weights alone (sorted names, aligned offsets, zeroed
gaps), so equal weights have equal digests; a tensor is never sent without the others of its group.

A group is what an engine rebuilds as a whole: the weights and biases of one module, where q, k and v are
one module, gate and up are one, and all experts of a layer are one. vLLM's layerwise reload makes such a
module anew from what arrived; half of a group leaves garbage in the other half, in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import torch

from actors.models.lora.low_rank import Factors
from actors.sync.digests import Algorithm, digest_of

Kind = Literal["adapter", "merged", "lora"]
"""`adapter`: LoRA's A and B, by the adapted weight's name in the bare base. `merged`: whole tensors, by
their names in the checkpoint. `lora`: A and s B in the engine's dtype, named like `adapter`."""

ALIGNMENT = 64
"""Bytes. Products of views that are aligned as torch's own allocations have the same bits on both sides."""

_FUSED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(?:experts\..*|experts|input_linear|output_linear)$"), ".experts"),
    (re.compile(r"\.(?:q|k|v)_proj$"), ".qkv_proj"),
    (re.compile(r"\.(?:q_a_proj|kv_a_proj_with_mqa)$"), ".fused_qkv_a_proj"),
    (re.compile(r"\.(?:gate|up)_proj$"), ".gate_up_proj"),
)
"""Module path -> the module that an engine makes of it and its siblings. GraniteMoe's checkpoints call the
experts of a layer input_linear and output_linear."""


@dataclass(frozen=True)
class PayloadEntry:
    """One tensor in the buffer."""

    name: str
    part: str
    """`A` or `B` of an adapter, `W` of merged weights."""
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """First byte in the buffer."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """Contents of the buffer, and what to do with them."""

    version: int
    payload: Kind
    base_dtype: str
    """Dtype of the base in the trainer. An engine that merges rounds its own base to it first, so that both
    add to the same weights."""
    entries: tuple[PayloadEntry, ...]
    scalings: dict[str, float]
    """Adapted weight -> s of W0 + s B A."""
    transposed: tuple[str, ...]
    """Adapted weights that are stored as (..., in, out)."""
    algorithm: Algorithm = "xxh3"
    """Of every digest of this version, on both sides."""
    later: tuple[tuple[PayloadEntry, ...], ...] = ()
    """Of the first part of merged weights that are sent in parts: the tensors of every other part, each in a
    buffer of its own."""

    @property
    def nbytes(self) -> int:
        """Length of the buffer."""
        return _size(self.entries)

    @property
    def nbytes_later(self) -> int:
        """Length of the buffers of the parts that follow."""
        return sum(map(_size, self.later))

    @property
    def names(self) -> list[str]:
        """Weights that this changes, each once, sorted."""
        return sorted({entry.name for entry in self.entries})

    @cached_property
    def digest(self) -> str:
        """Of names, shapes, dtypes, scalings and version."""
        return blake2b(self.encoded, digest_size=16).hexdigest()

    @cached_property
    def encoded(self) -> bytes:
        """`encode`, once for all engines."""
        return self.encode()

    def encode(self) -> bytes:
        """JSON, the same bytes for equal manifests."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @staticmethod
    def decode(raw: bytes) -> Manifest:
        """The inverse of `encode`."""
        found: dict[str, Any] = json.loads(raw)
        entries, transposed = _entries(found.pop("entries")), tuple(found.pop("transposed"))
        later = tuple(map(_entries, found.pop("later")))
        return Manifest(**found, entries=entries, transposed=transposed, later=later)


@dataclass(frozen=True)
class Payload:
    """A manifest and its bytes."""

    manifest: Manifest
    buffer: torch.Tensor
    """uint8 (bytes,)."""

    @cached_property
    def digest(self) -> str:
        """Of every byte of the buffer."""
        return digest_of(self.buffer, self.manifest.algorithm)

    def to(self, device: torch.device) -> Payload:
        """The same with its bytes on a device: itself if they are there."""
        return self if self.buffer.device == device else Payload(self.manifest, self.buffer.to(device))

    def tensors(self) -> dict[tuple[str, str], torch.Tensor]:
        """(name, part) -> a view into the buffer."""
        return self._views

    def factors(self) -> dict[str, Factors]:
        """Adapted weight -> its A and B, of a payload `adapter` or `lora`."""
        return self._factors

    @cached_property
    def _views(self) -> dict[tuple[str, str], torch.Tensor]:
        return {(entry.name, entry.part): _view(self.buffer, entry) for entry in self.manifest.entries}

    @cached_property
    def _factors(self) -> dict[str, Factors]:
        tensors, manifest = self._views, self.manifest
        return {
            name: Factors(tensors[name, "A"], tensors[name, "B"], scaling, name in manifest.transposed)
            for name, scaling in sorted(manifest.scalings.items())
        }


def pack_adapter(
    version: int,
    base_dtype: str,
    factors: Mapping[str, Factors],
    algorithm: Algorithm = "xxh3",
    kind: Kind = "adapter",
) -> Payload:
    """The A and B of every adapted weight in one buffer; for a payload `lora` they are `Factors.scaled`."""
    tensors = {(name, "A"): f.a for name, f in factors.items()}
    tensors |= {(name, "B"): f.b for name, f in factors.items()}
    scalings = {name: f.scaling for name, f in factors.items()}
    transposed = sorted(name for name, f in factors.items() if f.transposed)
    return _pack(version, kind, base_dtype, tensors, algorithm, scalings, transposed)


def pack_merged(
    version: int,
    base_dtype: str,
    tensors: Mapping[str, torch.Tensor],
    later: Sequence[Mapping[str, torch.Tensor]] = (),
    algorithm: Algorithm = "xxh3",
) -> Payload:
    """Merged weights under the names of their checkpoint in one buffer.

    `later`: tensors without storage (device meta), of the shapes and dtypes of each part that will follow.
    """
    parts = tuple(_layout(_whole(part)) for part in later)
    return _pack(version, "merged", base_dtype, _whole(tensors), algorithm, later=parts)


def factor_name(name: str, part: str) -> str:
    """The name of an adapted weight's A or B among the digests of a payload `lora`."""
    return f"{name} {part}"


def group_of(name: str) -> str:
    """The group of a weight or bias, by its name in a checkpoint or in the bare base in memory."""
    module = name.rpartition(".")[0]
    for pattern, fused in _FUSED:
        module, changed = pattern.subn(fused, module)
        if changed:
            return module
    return module


def fused_groups_of(touched: Iterable[str], known: Iterable[str]) -> list[str]:
    """Of all `known` names those whose group has a touched one: what has to be loaded together, sorted."""
    groups = {group_of(name) for name in touched}
    return sorted(name for name in known if group_of(name) in groups and not not_reloaded(name))


def not_reloaded(name: str) -> bool:
    """vLLM's reload leaves this tensor as it was loaded (model_loader/reload/meta.py, SKIP_LOAD_TENSORS).

    Corrections of routers, which no gradient reaches: transformers chooses experts with them and weighs
    the chosen without.
    """
    return name.rpartition(".")[2] == "e_score_correction_bias"


def _pack(
    version: int,
    payload: Kind,
    base_dtype: str,
    tensors: Mapping[tuple[str, str], torch.Tensor],
    algorithm: Algorithm,
    scalings: Mapping[str, float] | None = None,
    transposed: Sequence[str] = (),
    later: tuple[tuple[PayloadEntry, ...], ...] = (),
) -> Payload:
    entries = _layout(tensors)
    manifest = Manifest(
        version, payload, base_dtype, entries, dict(scalings or {}), tuple(transposed), algorithm, later
    )
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    buffer = torch.zeros(manifest.nbytes, dtype=torch.uint8, device=device)
    for entry in entries:
        _view(buffer, entry).copy_(tensors[entry.name, entry.part].detach())
    return Payload(manifest, buffer)


def _whole(tensors: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, "W"): tensor for name, tensor in tensors.items()}


def _layout(tensors: Mapping[tuple[str, str], torch.Tensor]) -> tuple[PayloadEntry, ...]:
    entries, offset = [], 0
    for (name, part), tensor in sorted(tensors.items()):
        entry = PayloadEntry(
            name, part, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), offset
        )
        entries.append(entry)
        offset = _aligned(offset + entry.nbytes)
    return tuple(entries)


def _entries(found: list[dict[str, Any]]) -> tuple[PayloadEntry, ...]:
    return tuple(PayloadEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in found)


def _size(entries: Sequence[PayloadEntry]) -> int:
    return max((_aligned(entry.offset + entry.nbytes) for entry in entries), default=0)


def _view(buffer: torch.Tensor, entry: PayloadEntry) -> torch.Tensor:
    raw = buffer[entry.offset : entry.offset + entry.nbytes]
    return raw.view(_dtype(entry.dtype)).view(entry.shape)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)

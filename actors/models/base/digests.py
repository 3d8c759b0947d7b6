"""Digests that prove what did not change: frozen tensors, adapters, checkpoint files."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import torch
from torch import nn

from actors.models.parallel.fsdp import whole
from actors.models.quantization.quantised_tensor import held

FULL_DIGEST_BYTES = 4 * 2**30
"""Up to here every byte is hashed (about 1 GB/s); above it, evenly spaced blocks of every tensor."""
SAMPLED_BLOCK_BYTES = 4096
SAMPLED_BLOCKS = 64
"""Blocks hashed of each tensor (or file) when sampling; first and last are always among them."""


def frozen_digest(model: nn.Module, max_bytes: int = FULL_DIGEST_BYTES) -> str:
    """Hash of everything that training must not move: parameters without gradient, and buffers.

    Above `max_bytes` in all, each tensor is sampled: a change of one element can then go unseen, an
    update of the tensor can't.
    """
    tensors = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    tensors += list(model.named_buffers())
    parts = [(f"{n}[{i}]" if i else n, part) for n, t in tensors for i, part in enumerate(held(t))]
    return _digest(parts, max_bytes)


def adapter_digest(model: nn.Module, adapter_name: str) -> str:
    """Hash of one adapter's A and B; equal for equal weights whatever the adapter is called."""
    mark = f".{adapter_name}."
    tensors = [(n.replace(mark, "."), p) for n, p in model.named_parameters() if mark in n and "lora_" in n]
    if not tensors:
        raise KeyError(adapter_name)
    return _digest(tensors, FULL_DIGEST_BYTES)


def base_fingerprint(directory: str | Path) -> str | None:
    """Identity of a base model's weights on disk, or None when there are none in safetensors.

    Tensor names, shapes and dtypes of every safetensors file, and sampled blocks of its bytes: quick
    for any size, equal for copies of the same base.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        return None
    return _files_fingerprint(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@functools.lru_cache(maxsize=16)
def _files_fingerprint(files: tuple[tuple[str, int, int], ...]) -> str:
    shapes: dict[str, object] = {}
    content = blake2b(digest_size=16)
    for name, size, _ in files:
        with open(name, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
            shapes.update({k: [v["dtype"], v["shape"]] for k, v in header.items() if k != "__metadata__"})
            for offset in _block_offsets(size - 8 - header_bytes):
                file.seek(8 + header_bytes + offset)
                content.update(file.read(SAMPLED_BLOCK_BYTES))
    content.update(json.dumps(sorted(shapes.items())).encode())
    return content.hexdigest()


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> str:
    ordered = sorted(tensors, key=lambda item: item[0])
    sampled = sum(t.numel() * t.element_size() for _, t in ordered) > max_bytes
    state = blake2b(digest_size=16)
    for name, tensor in ordered:
        state.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        raw = whole(tensor).contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else None
        if raw is None:
            continue
        if sampled:
            blocks = [raw[o : o + SAMPLED_BLOCK_BYTES] for o in _block_offsets(raw.numel())]
            raw = torch.cat(blocks)
        state.update(raw.cpu().numpy().data)
    return state.hexdigest()


def _block_offsets(size: int) -> list[int]:
    if size <= SAMPLED_BLOCKS * SAMPLED_BLOCK_BYTES:
        return list(range(0, size, SAMPLED_BLOCK_BYTES))
    last = size - SAMPLED_BLOCK_BYTES
    return [last * i // (SAMPLED_BLOCKS - 1) for i in range(SAMPLED_BLOCKS)]

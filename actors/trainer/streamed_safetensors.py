"""A safetensors file written tensor by tensor, for tensors that never are in memory all at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of dtypes."""


class DeferredTensor(NamedTuple):
    """A tensor to be written: name, shape and dtype now, values when its turn has come."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Makes the values; called on all ranks, as it may be collective."""


def write_tensors(file: Path, entries: Iterable[DeferredTensor], write: bool = True) -> None:
    """Make every tensor, in order, and write those of one file; peak memory is one tensor.

    The layout is that of `safetensors.torch.save_file`, which readers get the file by.

    Args:
        write: False on ranks that only take part in making tensors.
    """
    listed = list(entries)
    header, at = {}, 0
    for entry in listed:
        size = entry.shape.numel() * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if not write:
        for entry in listed:
            entry.make()
        return
    with file.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little"))
        out.write(raw)
        for entry in listed:
            tensor = entry.make()
            if tensor.shape != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(f"{entry.name} is {tuple(tensor.shape)} {tensor.dtype}, not as announced")
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            out.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")

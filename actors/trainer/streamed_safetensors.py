"""A safetensors file written tensor by tensor, for tensors that never are in memory all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from actors.models.tensor_file import TensorFile


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
    outline = {entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in listed}
    out = TensorFile(file, outline) if write else None
    for entry in listed:
        tensor = entry.make()
        if out is not None:
            out.write(entry.name, tensor)

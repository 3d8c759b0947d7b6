"""A safetensors file that is written a tensor at a time, for tensors that never are in memory all at once.

safetensors' own `save_file` wants all of them. Its format is a header with the place of every tensor, and
their bytes; so the header can be written first, and each tensor when it is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of dtypes, in the order in which `save_file` lays tensors out: large elements first, so
that each is aligned."""
_ALIGNMENT = 8


class TensorFile:
    """One file, while it is written."""

    def __init__(self, file: Path, outline: Mapping[str, torch.Tensor]) -> None:
        """Write the header. `outline`: names, shapes and dtypes of all tensors, in order; storage is
        not needed.

        Raises:
            OSError: it can't be written.
        """
        self._file = file
        self._left = dict(outline)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in outline.items():
            begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % _ALIGNMENT)
        start = _ALIGNMENT + len(raw)
        self._places = {name: start + header[name]["data_offsets"][0] for name in outline}
        self.size = start + end
        """Bytes of the whole file."""
        with file.open("wb") as opened:
            opened.write(len(raw).to_bytes(_ALIGNMENT, "little") + raw)

    @property
    def left(self) -> list[str]:
        """Tensors that were not written yet."""
        return list(self._left)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place, in any order.

        Raises:
            OSError: it can't be written.
            ValueError: it has another shape or dtype than its outline, or was written already.
        """
        outline = self._left.get(name)
        if outline is None or (tensor.shape, tensor.dtype) != (outline.shape, outline.dtype):
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} is not what was outlined")
        del self._left[name]
        if tensor.numel():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            with self._file.open("r+b") as opened:
                opened.seek(self._places[name])
                opened.write(raw.data)

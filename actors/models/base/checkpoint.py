"""The weights of a base on disk: names and shapes at once, tensors when asked for.

Of a base that is quantised while it is loaded (`model.quantization`) they are what is computed with:
quantised and dequantised. Experts in MXFP4 are dequantised, under the names that they have in 16 bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.errors import UserError
from actors.models.tensor_file import DTYPE_NAMES

if TYPE_CHECKING:
    from actors.models.quantization.layout import Rounding

_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
"""safetensors' names of what can be added to; bases quantised by other methods are refused."""
_BLOCKS, _SCALES = "_blocks", "_scales"
"""Ends of the names of an MXFP4 tensor's two parts."""
_INDEX = "model.safetensors.index.json"


class BaseCheckpoint:
    """The tensors of a base on disk, read when asked for."""

    def __init__(self, directory: str | Path, rounding: Rounding | None = None) -> None:
        """Open the files; no weights are read. `rounding`: of a base that is quantised while it is loaded.

        Raises:
            UserError: no safetensors, weights that are quantised by another method, or files without what is
                to be quantised.
        """
        self._rounding = rounding
        self._open: dict[Path, Any] = {}
        self._paths: dict[str, Path] = {}
        self.shapes: dict[str, torch.Tensor] = {}
        """Checkpoint name -> a tensor without storage, of its shape and of its dtype on disk."""
        for path in _files(Path(directory)):
            self._paths |= dict.fromkeys(self._file(path).keys(), path)
        for name, path in self._paths.items():
            whole = name.removesuffix(_BLOCKS)
            header = self._file(path).get_slice(name)
            if name.endswith(_BLOCKS) and whole + _SCALES in self._paths:
                *experts, rows, groups, half = header.get_shape()
                shape = (*experts, groups * half * 2, rows)
                self.shapes[whole] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            elif not (name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in self._paths):
                self.shapes[name] = _without_storage(header, name, directory)
        if rounding is not None and (lacking := sorted(rounding.names - self.shapes.keys())):
            raise UserError(
                f"model.quantization: the files in '{directory}' have no {lacking[0]} ({len(lacking)} such "
                "names); load the base with transformers, save it under its names of today, and name that"
            )

    def tensor(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """One tensor, as it is on disk, or dequantised; on `device` (None: the CPU), where that is done."""
        if name in self._paths:
            found = self._read(name, device)
        else:
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            blocks, scales = self._read(name + _BLOCKS, device), self._read(name + _SCALES, device)
            found = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        return found if self._rounding is None else self._rounding.of(name, found)

    def _read(self, name: str, device: torch.device | None) -> torch.Tensor:
        found: torch.Tensor = self._file(self._paths[name]).get_tensor(name)
        return found if device is None else found.to(device)

    def release(self) -> None:
        """Unmap what was read so far: until then its pages count as this process's memory. The next tensor
        opens its file again."""
        self._open.clear()

    def _file(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        return self._open[path]


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [directory / name for name in sorted(names)]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise UserError(f"model.base: '{directory}' has no safetensors, which a weight sync merges into")
    return found


def _without_storage(header: Any, name: str, directory: str | Path) -> torch.Tensor:
    dtype = _DTYPES.get(header.get_dtype())
    if dtype is None:
        raise UserError(
            f"model.base: '{directory}' holds {name} as {header.get_dtype()}; a weight sync needs a base in "
            f"{', '.join(_DTYPES)}"
        )
    return torch.empty(header.get_shape(), dtype=dtype, device="meta")

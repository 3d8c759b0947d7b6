"""The weights of a base on disk: names and shapes at once, tensors when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from actors.errors import UserError
from actors.models.tensor_file import DTYPE_NAMES

_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
"""safetensors' names of what can be added to; quantised bases are refused."""
_INDEX = "model.safetensors.index.json"


class BaseCheckpoint:
    """The tensors of a base on disk, read when asked for."""

    def __init__(self, directory: str | Path) -> None:
        """Open the files; no weights are read.

        Raises:
            UserError: no safetensors, or weights that are quantised.
        """
        self._open: dict[Path, Any] = {}
        self._paths: dict[str, Path] = {}
        self.shapes: dict[str, torch.Tensor] = {}
        """Checkpoint name -> a tensor without storage, of its shape and dtype."""
        for path in _files(Path(directory)):
            file = self._file(path)
            for name in file.keys():  # noqa: SIM118  it is no dict
                self._paths[name] = path
                self.shapes[name] = _without_storage(file.get_slice(name), name, directory)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, as it is on disk."""
        found: torch.Tensor = self._file(self._paths[name]).get_tensor(name)
        return found

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

"""Weights of a model on disk, written a tensor at a time and in any order.

safetensors' own `save_file` wants all tensors of a file in memory at once. Its format is a header with the
place of every tensor, and their bytes; so the header can be written first and each tensor when it is there.
The files are those of `save_file`, byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actors.models.files import give_usual_mode

MAX_SHARD_SIZE = "5GB"
_NAMES = {
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
"""safetensors' names of dtypes, in the order in which it lays tensors out: large elements first, so that each
is aligned."""
_ORDER = list(_NAMES)
_HEADER_ALIGNMENT = 8


class ShardedWeights:
    """The safetensors files of a model in a directory, one or with an index, while they are written."""

    def __init__(
        self, out_dir: Path, outline: Mapping[str, torch.Tensor], max_shard_size: int | str | None = None
    ) -> None:
        """`outline`: names, shapes and dtypes of all tensors that will be written; storage is not needed.

        Raises:
            OSError: the files can't be written.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        self._out_dir = out_dir
        self._outline = {name: torch.empty_like(t, device="meta") for name, t in outline.items()}
        self._split: Any = split_torch_state_dict_into_shards(
            self._outline,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size or MAX_SHARD_SIZE,
        )
        self._places: dict[str, tuple[Path, int]] = {}
        for file_name, names in self._split.filename_to_tensors.items():
            self._begin(out_dir / file_name, names)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place.

        Raises:
            OSError: it can't be written.
            ValueError: it has another shape or dtype than its outline, or was written already.
        """
        outline = self._outline.get(name)
        if outline is None or (tensor.shape, tensor.dtype) != (outline.shape, outline.dtype):
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} is not what was outlined")
        del self._outline[name]
        file, offset = self._places[name]
        if tensor.numel():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            with file.open("r+b") as opened:
                opened.seek(offset)
                opened.write(raw.data)

    def end(self) -> None:
        """Write the index of several files.

        Raises:
            ValueError: a tensor was not written.
        """
        if self._outline:
            raise ValueError(
                f"{len(self._outline)} tensors were not written, the first: {min(self._outline)}"
            )
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._out_dir / "model.safetensors.index.json").write_text(text)

    def _begin(self, file: Path, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names, key=lambda name: (_ORDER.index(self._outline[name].dtype), name)):
            tensor = self._outline[name]
            begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
            place = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            header[name] = place
            self._places[name] = file, begin
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % _HEADER_ALIGNMENT)
        start = _HEADER_ALIGNMENT + len(raw)
        for name in names:
            self._places[name] = file, start + self._places[name][1]
        with file.open("wb") as opened:
            opened.write(len(raw).to_bytes(_HEADER_ALIGNMENT, "little") + raw)
            # Room is asked for now: a full disk is told before anything is computed.
            if end:
                os.posix_fallocate(opened.fileno(), start, end)
        give_usual_mode(file)

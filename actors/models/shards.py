"""Weights of a model on disk, written a tensor at a time and in any order.

The files are those of safetensors' `save_file`, byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actors.models.files import give_usual_mode
from actors.models.tensor_file import DTYPE_NAMES, TensorFile

MAX_SHARD_SIZE = "5GB"
_ORDER = list(DTYPE_NAMES)


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
        outline = {name: torch.empty_like(tensor, device="meta") for name, tensor in outline.items()}
        self._split: Any = split_torch_state_dict_into_shards(
            outline,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size or MAX_SHARD_SIZE,
        )
        self._file_of: dict[str, TensorFile] = {}
        for file_name, names in self._split.filename_to_tensors.items():
            path = out_dir / file_name
            laid_out = sorted(names, key=lambda name: (_ORDER.index(outline[name].dtype), name))
            file = TensorFile(path, {name: outline[name] for name in laid_out})
            # Room is asked for now: a full disk is told before anything is computed.
            with path.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.size)
            give_usual_mode(path)
            self._file_of |= dict.fromkeys(names, file)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place. Raises: as `TensorFile.write`."""
        self._file_of[name].write(name, tensor)

    def end(self) -> None:
        """Write the index of several files.

        Raises:
            ValueError: a tensor was not written.
        """
        left = [name for file in {*self._file_of.values()} for name in file.left]
        if left:
            raise ValueError(f"{len(left)} tensors were not written, the first: {min(left)}")
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._out_dir / "model.safetensors.index.json").write_text(text)

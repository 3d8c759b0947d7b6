"""A sharded model written in transformers' layout, a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from actors.models.files import save_tensors
from actors.models.parallel.by_layer import by_layer
from actors.models.parallel.fsdp import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_FILE_BYTES = 2 * 10**9
"""Of one safetensors file, more than which rank 0 never keeps beside its own slices (and one layer)."""


def write_sharded_model(model: PreTrainedModel, directory: str | Path, write: bool) -> None:
    """Write config and weights under the checkpoint's names. Collective; those with `write` write.

    Names and shapes on disk are made by transformers from a layer's tensors alone: none of its conversions
    joins tensors of two layers.
    """
    from transformers.core_model_loading import revert_weight_conversion

    directory = Path(directory)
    if write:
        directory.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(str(directory))
        if model.generation_config is not None:
            model.generation_config.save_pretrained(str(directory))
    files: list[list[str]] = []
    total, pending = 0, dict[str, torch.Tensor]()
    for layer in _layers(model):
        gathered = {name: whole(tensor) for name, tensor in layer.items()}
        if not write:
            continue
        # Copies: what is gathered may be a view of the weights themselves, or lie on a GPU.
        found = {
            n: t.cpu().contiguous().clone() for n, t in revert_weight_conversion(model, gathered).items()
        }
        if pending and _nbytes(pending) + _nbytes(found) > MAX_FILE_BYTES:
            files.append(_write(directory, len(files), pending))
            pending = {}
        pending.update(found)
        total += _nbytes(found)
    if write:
        files.append(_write(directory, len(files), pending))
        _name(directory, files, total)


def _layers(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """State by layer; tied weights once, as a checkpoint has them."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    yield from by_layer(state).values()


def _write(directory: Path, index: int, tensors: dict[str, torch.Tensor]) -> list[str]:
    save_tensors(tensors, directory / _part(index), {"format": "pt"})
    return sorted(tensors)


def _part(index: int) -> str:
    return f"part-{index:05d}.safetensors"


def _name(directory: Path, files: list[list[str]], total: int) -> None:
    """Give the files the names that their number asks for, and write the index of more than one."""
    if len(files) == 1:
        (directory / _part(0)).rename(directory / "model.safetensors")
        return
    places = {}
    for index, names in enumerate(files):
        final = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        (directory / _part(index)).rename(directory / final)
        places.update(dict.fromkeys(names, final))
    index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")


def _nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())

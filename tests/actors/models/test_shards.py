"""Weights of a model on disk, written a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.models.shards import ShardedWeights

TENSORS = {
    "b": torch.randn(3, 4),
    "a": torch.randn(5).bfloat16(),
    "with.ü": torch.arange(3),
    "c": torch.zeros(2, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(4, 6).t(),
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.float64, torch.int32, torch.int16)},
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.uint8, torch.int8, torch.bool)},
}


def test_files_are_safetensors_own_whatever_the_order(tmp_path: Path) -> None:
    whole = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(whole, tmp_path / "theirs.safetensors", {"format": "pt"})
    for name, order in {"one": sorted(TENSORS), "other": sorted(TENSORS, reverse=True)}.items():
        (tmp_path / name).mkdir()
        weights = ShardedWeights(tmp_path / name, TENSORS)
        for tensor in order:
            weights.write(tensor, TENSORS[tensor])
        weights.end()
        assert [file.name for file in (tmp_path / name).iterdir()] == ["model.safetensors"]
        ours = (tmp_path / name / "model.safetensors").read_bytes()
        assert ours == (tmp_path / "theirs.safetensors").read_bytes()


def test_several_files_have_an_index_and_hold_every_tensor_once(tmp_path: Path) -> None:
    weights = ShardedWeights(tmp_path, TENSORS, max_shard_size=60)
    for name, tensor in TENSORS.items():
        weights.write(name, tensor)
    weights.end()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {
        name: tensor
        for file in set(index["weight_map"].values())
        for name, tensor in load_file(tmp_path / file).items()
    }
    assert len(set(index["weight_map"].values())) > 2
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in found)


def test_a_tensor_that_is_not_what_was_announced_or_is_left_out_is_an_error(tmp_path: Path) -> None:
    weights = ShardedWeights(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(3)})
    weights.write("a", torch.ones(2))
    for name, tensor in (("b", torch.ones(2)), ("b", torch.ones(3).half()), ("a", torch.ones(2))):
        with pytest.raises(ValueError, match=f"{name}: .* is not what was outlined"):
            weights.write(name, tensor)
    with pytest.raises(ValueError, match="1 tensors were not written, the first: b"):
        weights.end()

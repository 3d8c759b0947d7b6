"""Weights of a base on disk, read when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.errors import UserError
from actors.models.base.checkpoint import BaseCheckpoint


def test_a_base_in_several_files_is_read_through_its_index(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    save_file({"a": torch.zeros(9)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    base = BaseCheckpoint(tmp_path)
    assert {name: (tuple(t.shape), t.dtype) for name, t in base.shapes.items()} == {
        "a": ((3,), torch.float32),
        "b": ((2, 2), torch.bfloat16),
    }
    assert all(torch.equal(base.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({}, "has no safetensors"),
        ({"w": torch.zeros(4, dtype=torch.uint8)}, "holds w as U8; .* needs a base in F32, BF16, F16"),
    ],
)
def test_a_base_that_can_not_be_added_to_is_the_users_mistake(
    tmp_path: Path, tensors: dict[str, Any], problem: str
) -> None:
    if tensors:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=problem):
        BaseCheckpoint(tmp_path)

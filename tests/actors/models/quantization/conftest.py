"""A quantised base, and the same weights dequantised in files of their own: what the first has to equal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from actors.models.base.checkpoint import BaseCheckpoint
from actors.models.quantization.layout import Rounding


@pytest.fixture
def dequantised(tmp_path: Path) -> Callable[..., Path]:
    """Directory of a copy of a base whose files hold the dequantised weights."""

    def make(base: Path, kind: Any, dtype: torch.dtype = torch.float32) -> Path:
        copy = tmp_path / f"{base.name}-{kind}"
        shutil.copytree(base, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
        weights = BaseCheckpoint(base, Rounding(kind, AutoConfig.from_pretrained(base), dtype))
        save_file(
            {n: weights.tensor(n) for n in weights.shapes}, copy / "model.safetensors", {"format": "pt"}
        )
        return copy

    return make

"""Compares a merged model with base and adapter, by log-probabilities; a layer in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.errors import RunFailure
from actors.models.base.loading import load_base
from actors.models.base.streaming import stream_base
from actors.models.lora.adapters import attach_saved, role
from actors.models.quantization.quantised_tensor import dequantise_all
from actors.models.spec import ModelSpec, Quantization

LOAD_IN_FP32_BYTES = 2**30
"""Up to this size (as float32) the check runs in float32, larger bases in their own dtype. Of a merge into
float32 the limit is `EXACT_FP32_BYTES`."""
EXACT_FP32_BYTES = 8 * 2**30
FP32_TOLERANCE = 1e-4
"""Largest |log-probability difference| of a merge into float32 (seen: 8e-7), as a share of the
log-probability where that is beyond 1: rounding alone moves what a trained model all but excludes by 2e-4."""
ROUNDED_TOLERANCE = 0.05
"""Mean |log-probability difference| of a merge into 16 bits (seen: .0007-.004). The mean, because one
flipped route moves a single token by up to .4 when all is well. A trained base that gives most tokens hardly
any probability moves more by rounding alone (the embedded one by .1-.2): then twice that is the limit."""


@dataclass(frozen=True)
class Differences:
    """|log-probability differences| over the same tokens: merged against unmerged, and (`effect`) the mean of
    unmerged with against without its adapter."""

    largest: float
    mean: float
    median: float
    effect: float


def compare(
    base_dir: Path,
    adapter_dir: str | Path,
    merged_dir: Path,
    own: torch.dtype,
    target: torch.dtype,
    quantization: Quantization | None = None,
) -> Differences:
    """Differences over random tokens.

    Args:
        own: dtype of the base.
        target: of the merged model.
        quantization: of the base that the adapter was trained on.

    Raises:
        RunFailure: they are beyond tolerance.
    """
    compute = compute_dtype(base_dir, own, target)
    peft = attach_saved(_loaded(base_dir, compute, quantization), adapter_dir, "merge", trainable=False)
    vocab = peft.get_base_model().config.vocab_size
    ids = torch.randint(0, vocab, (2, 32), generator=torch.Generator().manual_seed(0))
    with role(peft, "merge"):
        unmerged = _logps(peft, ids)
    with role(peft, None):
        bare = _logps(peft, ids)
    diff = (_logps(_loaded(merged_dir, compute), ids) - unmerged).abs()
    largest, mean = float(diff.max()), float(diff.mean())
    exact = target == torch.float32 and compute == torch.float32
    relative = diff / unmerged.abs().clamp(min=1)
    off, limit = (float(relative.max()), FP32_TOLERANCE) if exact else (mean, ROUNDED_TOLERANCE)
    if not exact and off > limit:
        rounded = _rounded(base_dir, compute, quantization, target)
        limit = max(limit, 2 * float((_logps(rounded, ids) - bare).abs().mean()))
    if not off <= limit:
        raise RunFailure(
            "merge",
            "check",
            f"log-probabilities of the merged model differ by {off:.2g} (limit {limit:g}) from the unmerged",
            "nothing was written; merge with dtype float32, and if that fails too, report the architecture",
        )
    return Differences(largest, mean, float(diff.median()), float((unmerged - bare).abs().mean()))


def compute_dtype(base_dir: Path, own: torch.dtype, target: torch.dtype) -> torch.dtype:
    """Dtype in which to load a base for a merge into `target`."""
    size = sum(f.stat().st_size for f in base_dir.glob("*.safetensors"))
    as_fp32 = size * 4 // own.itemsize
    limit = EXACT_FP32_BYTES if target == torch.float32 else LOAD_IN_FP32_BYTES
    return torch.float32 if as_fp32 <= limit or own != torch.bfloat16 else own


def _logps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits.float().log_softmax(-1)
    return found


def _rounded(
    directory: Path, dtype: torch.dtype, quantization: Quantization | None, target: torch.dtype
) -> Any:
    """The base with every weight rounded to `target`."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(target).to(tensor.dtype)

    if quantization is None:
        return stream_base(_spec(directory, dtype), rounded)
    model = load_base(_spec(directory, dtype, quantization))
    dequantise_all(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = rounded(tensor.data)
    return model


def _loaded(directory: Path, dtype: torch.dtype, quantization: Quantization | None = None) -> Any:
    """A base or merged model; a quantised one is small, and in memory as a whole."""
    spec = _spec(directory, dtype, quantization)
    return stream_base(spec) if quantization is None else load_base(spec)


def _spec(directory: Path, dtype: torch.dtype, quantization: Quantization | None = None) -> ModelSpec:
    """Also of a base without a row of its architecture, as the adapter's run has probed that."""
    name: Any = str(dtype).removeprefix("torch.")
    return ModelSpec(base=str(directory), dtype=name, quantization=quantization, allow_untested=True)

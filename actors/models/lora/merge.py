"""Merges an adapter into its base: a full model, out of place, in float32, from the untouched base's files, a
tensor at a time.

Merging in place drifts (after 1,000 rounds 64 % of a bf16 base's weights had changed), and adding in
bf16 loses small updates, so neither is done. How much the output's dtype itself loses is measured.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actors.errors import RunFailure, UserError
from actors.models.architectures.conversion import checkpoint_tensors
from actors.models.architectures.meta_model import meta_model
from actors.models.base.loading import load_base, local_base_dir, resolve_base
from actors.models.files import new_model, writing
from actors.models.lora.adapters import attach_saved, base_quantization, check_adapter_matches_base
from actors.models.lora.heads import saved_head
from actors.models.lora.low_rank import Factors, low_rank_delta
from actors.models.lora.merge_check import compare, compute_dtype
from actors.models.lora.merge_files import FileMerge, Unchanged
from actors.models.parallel.fsdp import whole
from actors.models.quantization.layout import Rounding
from actors.models.quantization.quantised_tensor import plain
from actors.models.shards import ShardedWeights
from actors.models.spec import ModelSpec
from actors.models.turn_ends import write_turn_ends

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge: sizes, and differences from the unmerged model."""

    out_dir: str
    dtype: str
    merged_weights: int
    """Tensors that the adapter changed."""
    max_logprob_diff: float | None
    """Largest |difference| of log-probabilities, merged reloaded against unmerged; None if unchecked."""
    mean_logprob_diff: float | None
    median_logprob_diff: float | None
    adapter_effect: float | None
    """Mean |difference| between the unmerged model with and without its adapter: beside it a loss is large or
    small."""
    unchanged_share: float
    """Share of the adapted weights whose value is the base's own after rounding to `dtype`."""
    unchanged_share_bf16: float
    """The same, had they been rounded to bfloat16."""
    seconds: float


@dataclass(frozen=True)
class _Weights:
    """A model's weights, ready to be written."""

    outline: Mapping[str, torch.Tensor]
    """Names, shapes and dtypes."""
    tensors: Iterable[tuple[str, torch.Tensor]]
    unchanged: Unchanged
    """Counted while the tensors are made."""
    adapted: int
    """Weights in memory that the adapter changes."""
    model: type


def merge_adapter(
    base: str | None,
    adapter_dir: str | Path,
    out_dir: str | Path,
    dtype: str | None = None,
    *,
    check: bool = True,
) -> MergeReport:
    """Write base + adapter as a full Hugging Face model (safetensors, checkpoint names, tokenizer).

    An adapter that was trained on a quantised base is added to that base dequantised, bit for bit what the
    trainer computed with.

    Args:
        base: directory or hub id; None takes the one that the adapter names.
        dtype: of the output; None keeps the base's.
        check: load the result again and compare log-probabilities with the unmerged model.

    It is written beside `out_dir` and renamed when it is complete and compared: an attempt that fails or is
    killed leaves nothing there.

    Raises:
        UserError: the adapter is of another base, or `out_dir` holds something already.
        RunFailure: the merged model's log-probabilities are beyond tolerance, or the disk is full.
    """
    with new_model(out_dir) as aside:
        return dataclasses.replace(_merge(base, adapter_dir, aside, dtype, check), out_dir=str(out_dir))


def _merge(
    base: str | None, adapter_dir: str | Path, out_dir: Path, dtype: str | None, check: bool
) -> MergeReport:
    started = time.monotonic()
    base_dir, config = base_of_adapter(base, adapter_dir)
    own = _dtype(_dtype_name(getattr(config, "dtype", None)))
    target = _dtype(dtype) if dtype else own
    weights = _weights(base_dir, config, adapter_dir, own, target)
    with writing(out_dir):
        _write(weights.outline, weights.tensors, weights.model, out_dir, base_dir)
    trained_on = base_quantization(adapter_dir)
    kind = None if trained_on is None else trained_on[0]
    found = compare(base_dir, adapter_dir, out_dir, own, target, kind) if check else None
    return MergeReport(
        str(out_dir),
        _dtype_name(target),
        weights.adapted,
        found.largest if found else None,
        found.mean if found else None,
        found.median if found else None,
        found.effect if found else None,
        weights.unchanged.share(target),
        weights.unchanged.share(torch.bfloat16),
        time.monotonic() - started,
    )


def base_of_adapter(base: str | None, adapter_dir: str | Path) -> tuple[Path, PretrainedConfig]:
    """Directory and config of the base that an adapter is for; `base` as of `merge_adapter`.

    Raises:
        UserError: the adapter is of another base, or has a head that a merged model would lose.
    """
    resolved = resolve_base(ModelSpec(base=str(base or adapter_dir), allow_untested=True)).checked()
    base_dir = local_base_dir(resolved.base_path)
    assert resolved.config is not None
    problems = check_adapter_matches_base(adapter_dir, resolved.config, base_dir)
    if not problems and saved_head(adapter_dir) is not None:
        problems = [f"adapter '{adapter_dir}' is a reward model or critic: merged, it would lose its head"]
    if problems:
        raise UserError(problems)
    return base_dir, resolved.config


def saved_factors(config: PretrainedConfig, adapter_dir: str | Path) -> dict[str, Factors]:
    """`adapter_factors` of a saved adapter; its base is not read."""
    model = meta_model(config)
    return adapter_factors(attach_saved(model, adapter_dir, "merge", trainable=False), "merge")


def _weights(
    base_dir: Path, config: Any, adapter_dir: str | Path, own: torch.dtype, target: torch.dtype
) -> _Weights:
    """What to write, a tensor at a time where the base's files allow it."""
    model, factors = meta_model(config), saved_factors(config, adapter_dir)
    unchanged = Unchanged({target, torch.bfloat16})
    trained_on = base_quantization(adapter_dir)
    rounding = None if trained_on is None else Rounding(trained_on[0], config, trained_on[1])
    merge = FileMerge.of(base_dir, config, factors, target, rounding)
    if merge is not None:
        return _Weights(merge.outline(), merge.tensors(unchanged), unchanged, len(factors), type(model))
    dtype: Any = _dtype_name(compute_dtype(base_dir, own, target) if rounding is None else rounding.dtype)
    kind = None if rounding is None else rounding.kind
    loaded = load_base(ModelSpec(base=str(base_dir), dtype=dtype, quantization=kind, allow_untested=True))
    peft = attach_saved(loaded, adapter_dir, "merge", trainable=False)
    state = merged_state(peft, "merge", target, unchanged)
    return _Weights(state, state.items(), unchanged, len(factors), type(model))


def merged_state(
    model: PeftModel | PreTrainedModel,
    adapter_name: str | None = None,
    dtype: torch.dtype | None = None,
    unchanged: Unchanged | None = None,
) -> dict[str, torch.Tensor]:
    """All weights of a model with an adapter merged in, under the names of its checkpoint.

    Out of place: the model is not touched; tensors without an adapter are shared, not copied, where
    `dtype` (None: the base's) is their own. Adapted ones are computed in float32 and rounded once, and
    counted in `unchanged`.
    """
    base = _base_of(model)
    deltas = adapter_deltas(model, adapter_name) if adapter_name else {}
    state = {}
    for name, held in base_tensors(base).items():
        tensor = plain(held)
        to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        delta = deltas.pop(name, None)
        if delta is None:
            state[name] = tensor.to(to)
            continue
        before = tensor.float()
        after = before + delta
        state[name] = after.to(to)
        if unchanged is not None:
            unchanged.count(before, after)
    if deltas:
        raise RunFailure("merge", "merge", f"no base tensor for {sorted(deltas)[:3]}")
    return checkpoint_tensors(base, state)


def adapter_deltas(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Name of each adapted tensor in the bare base -> s B A in float32, of the tensor's shape."""
    return {name: low_rank_delta(f) for name, f in adapter_factors(model, adapter_name).items()}


def adapter_factors(model: nn.Module, adapter_name: str) -> dict[str, Factors]:
    """Name of each adapted tensor in the bare base -> its A and B, out of PEFT's layout."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    factors = {}
    for name, layer in _base_of(model).named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        a = whole(layer.lora_A[adapter_name].weight).float()
        b = whole(layer.lora_B[adapter_name].weight).float()
        leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
            a = a.reshape(layer.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
        transposed = bool(getattr(layer.get_base_layer(), "is_transposed", False)) and a.ndim == 3
        scaling = float(layer.scaling[adapter_name])
        factors[f"{_bare(name)}.{leaf}"] = Factors(a.contiguous(), b.contiguous(), scaling, transposed)
    return factors


def write_model(
    model: nn.Module, state: Mapping[str, torch.Tensor], out_dir: str | Path, base_dir: str | Path
) -> None:
    """Write weights (checkpoint names) together with the base's own config, tokenizer and chat template."""
    _write(state, state.items(), type(_base_of(model)), Path(out_dir), Path(base_dir))


def _write(
    outline: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    model: type,
    out_dir: Path,
    base_dir: Path,
) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    others = [f for f in sorted(base_dir.iterdir()) if f.suffix in (".json", ".jinja", ".txt", ".model")]
    for file in others:
        if base_dir != out_dir and "safetensors.index" not in file.name:
            shutil.copyfile(file, out_dir / file.name)
    config = json.loads((base_dir / "config.json").read_text())
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)  # What came in MXFP4 is dequantised.
    config["dtype"] = _dtype_name(next(t.dtype for t in outline.values() if t.is_floating_point()))
    config.setdefault("architectures", [model.__name__])
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_turn_ends(out_dir)
    weights = ShardedWeights(out_dir, outline)
    for name, tensor in tensors:
        weights.write(name, tensor)
    weights.end()


def _base_of(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _bare(name: str) -> str:
    return name.replace(".base_layer", "")


def base_tensors(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The bare base's state, tied weights once."""
    tied = set(getattr(base, "all_tied_weights_keys", None) or {})
    state = base.state_dict()
    return {_bare(n): t.detach() for n, t in state.items() if "lora_" not in n and _bare(n) not in tied}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype: '{name}' is none of float32, bfloat16, float16")
    return dtype


def _dtype_name(dtype: torch.dtype | str | None) -> str:
    return str(dtype or "float32").removeprefix("torch.")

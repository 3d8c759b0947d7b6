"""Merges an adapter into its base: a full model, out of place, in float32, from the untouched base.

Merging in place drifts (after 1,000 rounds 64 % of a bf16 base's weights had changed), and adding in
bf16 loses small updates, so neither is done. How much the output's dtype itself loses is measured.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actors.errors import RunFailure, UserError
from actors.models.base.loading import load_base, local_base_dir, resolve_base
from actors.models.files import new_model, save_tensors, writing
from actors.models.lora.adapters import attach_saved, check_adapter_matches_base, read_head, role
from actors.models.lora.low_rank import Factors, low_rank_delta
from actors.models.parallel.fsdp import whole
from actors.models.spec import ModelSpec
from actors.models.turn_ends import write_turn_ends

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LOAD_IN_FP32_BYTES = 8 * 2**30
"""Up to this size (as float32) the check runs in float32; larger bases are loaded in their own dtype."""
MAX_SHARD_SIZE = "5GB"
FP32_TOLERANCE = 1e-4
"""Largest |log-probability difference| of a merge into float32 (seen: 8e-7), as a share of the
log-probability where that is beyond 1: rounding alone moves what a trained model all but excludes by 2e-4."""
ROUNDED_TOLERANCE = 0.05
"""Mean |log-probability difference| of a merge into 16 bits (seen: .0007-.004). The mean, because one
flipped route moves a single token by up to .4 when all is well. A trained base that gives most tokens hardly
any probability moves more by rounding alone (the embedded one by .1-.2): then twice that is the limit."""


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


def merge_adapter(
    base: str | None,
    adapter_dir: str | Path,
    out_dir: str | Path,
    dtype: str | None = None,
    *,
    check: bool = True,
) -> MergeReport:
    """Write base + adapter as a full Hugging Face model (safetensors, checkpoint names, tokenizer).

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
    resolved = resolve_base(ModelSpec(base=str(base or adapter_dir), allow_untested=True)).checked()
    base_dir = local_base_dir(resolved.base_path)
    assert resolved.config is not None
    problems = check_adapter_matches_base(adapter_dir, resolved.config, base_dir)
    if not problems and read_head(adapter_dir) is not None:
        problems = [f"adapter '{adapter_dir}' is a reward model or critic: merged, it would lose its head"]
    if problems:
        raise UserError(problems)
    own_dtype = _dtype_name(getattr(resolved.config, "dtype", None))
    model = _loaded(base_dir, _load_dtype(base_dir, own_dtype))
    peft = attach_saved(model, adapter_dir, "merge", trainable=False)
    target = _dtype(dtype or own_dtype)
    deltas = adapter_deltas(peft, "merge")
    unchanged, unchanged_bf16 = _unchanged(peft, deltas, (target, torch.bfloat16))
    with writing(out_dir):
        write_model(peft, merged_state(peft, "merge", target), out_dir, base_dir)
    found = _compare(peft, out_dir, target, base_dir) if check else None
    return MergeReport(
        str(out_dir),
        _dtype_name(target),
        len(deltas),
        found.largest if found else None,
        found.mean if found else None,
        found.median if found else None,
        found.effect if found else None,
        unchanged,
        unchanged_bf16,
        time.monotonic() - started,
    )


def merged_state(
    model: PeftModel | PreTrainedModel, adapter_name: str | None = None, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """All weights of a model with an adapter merged in, under the names of its checkpoint.

    Out of place: the model is not touched; tensors without an adapter are shared, not copied, where
    `dtype` (None: the base's) is their own. Adapted ones are computed in float32 and rounded once.
    """
    from transformers.core_model_loading import revert_weight_conversion

    base = _base_of(model)
    deltas = adapter_deltas(model, adapter_name) if adapter_name else {}
    state = {}
    for name, tensor in base_tensors(base).items():
        to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        delta = deltas.pop(name, None)
        state[name] = tensor.to(to) if delta is None else (tensor.float() + delta).to(to)
    if deltas:
        raise RunFailure("merge", "merge", f"no base tensor for {sorted(deltas)[:3]}")
    return revert_weight_conversion(base, state)


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
    from huggingface_hub import split_torch_state_dict_into_shards

    out_dir, base_dir = Path(out_dir), Path(base_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    others = [f for f in sorted(base_dir.iterdir()) if f.suffix in (".json", ".jinja", ".txt", ".model")]
    for file in others:
        if base_dir != out_dir and "safetensors.index" not in file.name:
            shutil.copyfile(file, out_dir / file.name)
    config = json.loads((base_dir / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = _dtype_name(next(t.dtype for t in state.values() if t.is_floating_point()))
    config.setdefault("architectures", [type(_base_of(model)).__name__])
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_turn_ends(out_dir)
    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE
    )
    for file_name, names in split.filename_to_tensors.items():
        tensors = {name: state[name].detach().cpu().contiguous() for name in names}
        save_tensors(tensors, out_dir / file_name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out_dir / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


@dataclass(frozen=True)
class _Differences:
    """|log-probability differences| over the same tokens: merged against unmerged, and (`effect`) the mean of
    unmerged with against without its adapter."""

    largest: float
    mean: float
    median: float
    effect: float


def _compare(peft: PeftModel, out_dir: Path, target: torch.dtype, base_dir: Path) -> _Differences:
    """Differences over random tokens; beyond tolerance an error."""
    compute = next(peft.parameters()).dtype
    vocab = peft.get_base_model().config.vocab_size
    ids = torch.randint(0, vocab, (2, 32), generator=torch.Generator().manual_seed(0))
    diff, size = _distance(peft, "merge", _loaded(out_dir, _dtype_name(compute)), ids)
    largest, mean = float(diff.max()), float(diff.mean())
    exact = target == torch.float32 and compute == torch.float32
    off, limit = (float((diff / size).max()), FP32_TOLERANCE) if exact else (mean, ROUNDED_TOLERANCE)
    if not exact and off > limit:
        rounded = _loaded(base_dir, _dtype_name(compute))
        for tensor in (*rounded.parameters(), *rounded.buffers()):
            tensor.data = tensor.data.to(target).to(tensor.dtype)
        limit = max(limit, 2 * float(_distance(peft, None, rounded, ids)[0].mean()))
    if not off <= limit:
        raise RunFailure(
            "merge",
            "check",
            f"log-probabilities of the merged model differ by {off:.2g} (limit {limit:g}) from the unmerged",
            "nothing was written; merge with dtype float32, and if that fails too, report the architecture",
        )
    with torch.no_grad(), role(peft, None):
        bare = peft(input_ids=ids).logits.float().log_softmax(-1)
    with torch.no_grad(), role(peft, "merge"):
        effect = (peft(input_ids=ids).logits.float().log_softmax(-1) - bare).abs().mean()
    return _Differences(largest, mean, float(diff.median()), float(effect))


def _distance(
    peft: PeftModel, adapter: str | None, other: PreTrainedModel, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """|log-probability difference| of another model from this one with an adapter, or with none, and the
    |log-probability| itself, at least 1."""
    with torch.no_grad():
        with role(peft, adapter):
            own = peft(input_ids=ids).logits.float().log_softmax(-1)
        diff = (other(input_ids=ids).logits.float().log_softmax(-1) - own).abs()
        return diff, own.abs().clamp(min=1)


def _loaded(directory: Path, dtype: Any) -> PreTrainedModel:
    """A base or merged model; also without a row of its architecture, as the adapter's run has probed
    that."""
    return load_base(ModelSpec(base=str(directory), dtype=dtype, allow_untested=True))


def _unchanged(
    peft: PeftModel, deltas: Mapping[str, torch.Tensor], dtypes: tuple[torch.dtype, ...]
) -> list[float]:
    """Per dtype: share of adapted weights that rounding gives back their old value."""
    tensors = base_tensors(_base_of(peft))
    total = sum(d.numel() for d in deltas.values())
    same = [0] * len(dtypes)
    for name, delta in deltas.items():
        before = tensors[name].float()
        after = before + delta
        for i, dtype in enumerate(dtypes):
            same[i] += int((after.to(dtype) == before.to(dtype)).sum())
    return [s / max(total, 1) for s in same]


def _base_of(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _bare(name: str) -> str:
    return name.replace(".base_layer", "")


def base_tensors(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The bare base's state, tied weights once."""
    tied = set(getattr(base, "all_tied_weights_keys", None) or {})
    state = base.state_dict()
    return {_bare(n): t.detach() for n, t in state.items() if "lora_" not in n and _bare(n) not in tied}


def _load_dtype(base_dir: Path, own: str) -> Any:
    size = sum(f.stat().st_size for f in base_dir.glob("*.safetensors"))
    as_fp32 = size * (1 if own == "float32" else 2)
    return "float32" if as_fp32 <= LOAD_IN_FP32_BYTES or own != "bfloat16" else own


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype: '{name}' is none of float32, bfloat16, float16")
    return dtype


def _dtype_name(dtype: torch.dtype | str | None) -> str:
    return str(dtype or "float32").removeprefix("torch.")

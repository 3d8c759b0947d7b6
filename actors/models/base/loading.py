"""Loads a base model and its tokenizer from where `actors.models.base.resolving` finds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors.errors import UserError
from actors.models.architectures.lookup import architecture_of
from actors.models.base.mxfp4 import dequantized_mxfp4, is_mxfp4, without_quantization
from actors.models.base.resolving import (
    ADAPTER_CONFIG,
    ResolvedBase,
    first_line,
    follow_adapter,
    is_adapter_dir,
    local_base_dir,
    locate_base,
    no_such_directory,
    resolve_base,
)
from actors.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ADAPTER_CONFIG",
    "ResolvedBase",
    "is_adapter_dir",
    "load_base",
    "load_tokenizer",
    "local_base_dir",
    "locate_base",
    "no_progress_bars",
    "no_such_directory",
    "resolve_base",
]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The base's tokenizer (an adapter's own, where it has one), with a pad token.

    Raises:
        UserError: there is no tokenizer in the base's directory.
    """
    place, adapter, problems = follow_adapter(spec.base)
    if problems:
        raise UserError(problems)
    if not Path(place).is_dir():
        resolve_base(spec).checked()
    if adapter and _has_tokenizer(adapter):
        place = adapter
    # Without this, transformers 5 makes an empty tokenizer of the class that the model type names.
    if Path(place).is_dir() and not _has_tokenizer(place):
        raise UserError(f"model.base: '{place}' has no tokenizer ({' or '.join(_TOKENIZER_FILES)})")
    try:
        tokenizer = _tokenizer_class(place).from_pretrained(place, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        problem = f"model.base: '{place}' has no tokenizer that loads: {first_line(error)}"
        raise UserError(problem) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_class(place: str) -> Any:
    """AutoTokenizer, or the general class where the files name that one: importing AutoTokenizer also imports
    torch and half of transformers, 4 s that a driver has no other use for."""
    try:
        named = json.loads((Path(place) / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        named = {}
    fast = (Path(place) / "tokenizer.json").is_file() and "auto_map" not in named
    if fast and named.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def load_base(
    spec: ModelSpec,
    device: str | torch.device = "cpu",
    seed: int = 0,
    shards: int = 1,
    split: Literal["layers", "experts"] = "layers",
    mesh: DeviceMesh | None = None,
) -> PreTrainedModel:
    """The base model in evaluation mode, without cache and without router logits in its outputs.

    With `spec.random_init` its weights are random, from `seed`. An adapter named by `spec.base` is not
    applied: see `resolve_base(...).adapter_path` and `actors.models.lora.adapters`. With `shards` above 1,
    the ranks of the process group, each reads and holds only its slices: of all weights, gathered by layers
    (`actors.models.parallel.fsdp`), or of stacks of experts alone (`actors.models.moe.expert_parallel`).
    With `mesh` the ranks on it hold one model together (`actors.models.parallel.tensor_parallel`).
    With `spec.quantization` a whole base holds quantised weights (`actors.models.quantization`).

    Raises:
        UserError: the base can't be found, is no causal LM, or is an architecture without a row; it is to be
            quantised and split, or is of an architecture where it can't be.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from actors.models.moe.router_stats import make_routing_deterministic
    from actors.models.parallel.fsdp import load_weights, shard_loaded

    resolved = resolve_base(spec).checked()
    how = _arguments(spec, resolved.config) | _of_quantized(spec, resolved, device, shards, mesh)
    if spec.random_init:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(resolved.config, **how)
        model.config._name_or_path = resolved.base_path
        if mesh is not None:
            _split_layers(model, mesh)
        elif shards > 1:
            model = _split_experts(model, device) if split == "experts" else shard_loaded(model, shards)
    else:
        try:
            with no_progress_bars():
                if mesh is not None:
                    model = _load_split_layers(resolved, mesh, how)
                elif shards > 1 and split == "experts":
                    model = _load_split_experts(resolved, device, how)
                else:
                    model = load_weights(AutoModelForCausalLM, resolved.base_path, shards, how)
        except (OSError, SafetensorError) as error:
            problem = f"model.base: '{resolved.base_path}' did not load: {first_line(error)}"
            raise UserError(problem) from error
    if is_mxfp4(resolved.config):
        model = model.to(how["dtype"])  # Dequantised into bfloat16.
        model._weight_conversions = None  # They are not what it is saved by, as transformers would have it.
    model.config.use_cache = False
    # With router logits in the outputs transformers adds its auxiliary loss, also to a frozen router.
    model.config.output_router_logits = False
    make_routing_deterministic(model)
    return (model if shards > 1 else model.to(device)).eval()


def _arguments(spec: ModelSpec, config: Any) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` and `from_config`, from the spec and the architecture's
    row."""
    import torch

    how: dict[str, Any] = {
        "dtype": getattr(torch, spec.dtype),
        "attn_implementation": spec.attn_implementation,
        "trust_remote_code": spec.trust_remote_code,
    }
    row = None if config is None else architecture_of(config)
    if row is not None and spec.attn_implementation == "sdpa":
        how["attn_implementation"] = row.attention
    if row is not None and row.is_moe and row.grouped_experts:
        how["experts_implementation"] = spec.moe.experts_implementation
    return how


def _of_quantized(
    spec: ModelSpec, resolved: ResolvedBase, device: str | torch.device, shards: int, mesh: DeviceMesh | None
) -> dict[str, Any]:
    """Further arguments for a base that is quantised here, or comes in MXFP4."""
    assert resolved.config is not None
    comes_small = is_mxfp4(resolved.config) and not spec.random_init
    if spec.quantization is None and not comes_small:
        return {}
    small = f"model.quantization: {spec.quantization}" if spec.quantization else "model.base: MXFP4"
    if spec.random_init:
        raise UserError(f"{small} is of a base that is read from files; leave out random_init")
    if shards > 1 or mesh is not None:
        whole = "set sharding: none and tensor_parallel_size: 1"
        raise UserError(f"{small} is of a base that each rank reads whole; {whole}")
    if spec.quantization is None:
        return dequantized_mxfp4(resolved.base_path)
    from actors.models.quantization.loading import FrozenBaseConfig

    how: dict[str, Any] = {"quantization_config": FrozenBaseConfig(spec.quantization, device, comes_small)}
    return how | ({"config": without_quantization(resolved.config)} if comes_small else {})


def _load_split_layers(resolved: ResolvedBase, mesh: DeviceMesh, how: dict[str, Any]) -> PreTrainedModel:
    from actors.models.architectures.meta_model import meta_model
    from actors.models.parallel.tensor_parallel import load_split

    assert resolved.config is not None
    return load_split(type(meta_model(resolved.config)), resolved.base_path, mesh, how)


def _split_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    from actors.models.parallel.tensor_parallel import split_layers

    split_layers(model, mesh)


def _load_split_experts(
    resolved: ResolvedBase, device: str | torch.device, how: dict[str, Any]
) -> PreTrainedModel:
    from actors.models.architectures.meta_model import meta_model
    from actors.models.moe.expert_parallel import load_split_experts

    assert resolved.config is not None
    return load_split_experts(type(meta_model(resolved.config)), resolved.base_path, device, how)


def _split_experts(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    from actors.models.moe.expert_parallel import split_experts

    return split_experts(model, device)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' own bars out of logs and of the terminal that shows the run's progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _has_tokenizer(directory: str) -> bool:
    return any((Path(directory) / name).is_file() for name in _TOKENIZER_FILES)

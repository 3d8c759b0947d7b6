"""Loads a base model and its tokenizer from where `actors.models.base.resolving` finds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors.errors import UserError
from actors.models.architectures.lookup import architecture_of
from actors.models.base.mxfp4 import dequantized_mxfp4, is_mxfp4, without_quantization
from actors.models.base.resolving import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
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
    "ADAPTER_WEIGHTS",
    "ResolvedBase",
    "Split",
    "is_adapter_dir",
    "load_base",
    "load_tokenizer",
    "local_base_dir",
    "locate_base",
    "no_progress_bars",
    "no_such_directory",
    "resolve_base",
]

Split = Literal["tensors", "layers", "experts", "layers and experts"]
"""What the ranks of a mesh split: see `load_base`."""

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
    mesh: DeviceMesh | None = None,
    split: Split = "tensors",
) -> PreTrainedModel:
    """The base model in evaluation mode, without cache and without router logits in its outputs.

    With `spec.random_init` its weights are random, from `seed`. An adapter named by `spec.base` is not
    applied: see `resolve_base(...).adapter_path` and `actors.models.lora.adapters`. The ranks on a
    `mesh` (`Ranks.mesh`, `Ranks.split_mesh`) hold the model together, each the slices that it reads: of all
    weights, gathered by layers (`actors.models.parallel.fsdp`), of stacks of experts
    (`actors.models.moe.expert_parallel`), of both so, or of tensors inside of layers
    (`actors.models.parallel.tensor_parallel`). With `spec.quantization` a whole base holds quantised weights
    (`actors.models.quantization`).

    What is on the CPU, needs no other dtype and is put together from no other tensors, stays the mapped file:
    the ranks of a node share its pages. Whoever writes into such a weight gets pages of its own; the file has
    to stay as it is.

    Raises:
        UserError: the base can't be found, is no causal LM, or is an architecture without a row; it is to be
            quantised and split, or is of an architecture where it can't be.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    resolved = resolve_base(spec).checked()
    how = loading_arguments(spec, resolved.config) | _of_quantized(spec, resolved, device, mesh)
    divide = _divider(device, mesh, split)
    if spec.random_init:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(resolved.config, **how)
        model.config._name_or_path = resolved.base_path
        divide(model)
        model.tie_weights()
        if mesh is None or split in ("tensors", "experts"):
            model = model.to(device)
    else:
        try:
            with no_progress_bars():
                model = _loaded(resolved, divide, device, how)
        except (OSError, SafetensorError) as error:
            problem = f"model.base: '{resolved.base_path}' did not load: {first_line(error)}"
            raise UserError(problem) from error
    return finished(model)


def finished(model: PreTrainedModel) -> PreTrainedModel:
    """A loaded base, ready for passes."""
    from actors.models.moe.router_stats import make_routing_deterministic

    model.config.use_cache = False
    # With router logits in the outputs transformers adds its auxiliary loss, also to a frozen router.
    model.config.output_router_logits = False
    make_routing_deterministic(model)
    return model.eval()


def _divider(device: str | torch.device, mesh: DeviceMesh | None, split: Split) -> Callable[[Any], None]:
    """What splits a model, on the meta device or not, among the ranks of the mesh."""
    from actors.models.moe.expert_parallel import split_experts, split_experts_and_layers
    from actors.models.parallel.fsdp import shard_layers
    from actors.models.parallel.tensor_parallel import split_layers

    if mesh is None:
        return lambda model: None
    if split == "tensors":
        return partial(split_layers, mesh=mesh)
    if split == "layers":
        return partial(shard_layers, mesh=mesh)
    by_experts = split_experts if split == "experts" else split_experts_and_layers
    return partial(by_experts, mesh=mesh, device=device)


def _loaded(
    resolved: ResolvedBase, divide: Callable[[Any], None], device: str | torch.device, how: dict[str, Any]
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from actors.models.architectures.meta_model import meta_model
    from actors.models.parallel.partial_loading import load_divided

    assert resolved.config is not None
    brings_code = getattr(resolved.config, "auto_map", None) and how["trust_remote_code"]
    if not brings_code and "quantization_config" not in how:
        model_class = type(meta_model(resolved.config))
        return load_divided(model_class, resolved.base_path, divide, device, how)
    # Only transformers' automatic class finds code that came with the base, and quantised weights are made
    # where they are to stay.
    model: Any = AutoModelForCausalLM.from_pretrained(resolved.base_path, use_safetensors=True, **how)
    if is_mxfp4(resolved.config):
        model = model.to(how["dtype"])  # Dequantised into bfloat16.
        model._weight_conversions = None  # They are not what it is saved by, as transformers would have it.
    divide(model)
    loaded: PreTrainedModel = model.to(device)
    return loaded


def loading_arguments(spec: ModelSpec, config: Any) -> dict[str, Any]:
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
    spec: ModelSpec, resolved: ResolvedBase, device: str | torch.device, mesh: DeviceMesh | None
) -> dict[str, Any]:
    """Further arguments for a base that is quantised here, or comes in MXFP4."""
    assert resolved.config is not None
    comes_small = is_mxfp4(resolved.config) and not spec.random_init
    if spec.quantization is None and not comes_small:
        return {}
    small = f"model.quantization: {spec.quantization}" if spec.quantization else "model.base: MXFP4"
    if spec.random_init:
        raise UserError(f"{small} is of a base that is read from files; leave out random_init")
    if mesh is not None:
        whole = "set sharding: none and tensor_parallel_size: 1"
        raise UserError(f"{small} is of a base that each rank reads whole; {whole}")
    if spec.quantization is None:
        return dequantized_mxfp4(resolved.base_path)
    from actors.models.quantization.loading import FrozenBaseConfig

    how: dict[str, Any] = {"quantization_config": FrozenBaseConfig(spec.quantization, device, comes_small)}
    return how | ({"config": without_quantization(resolved.config)} if comes_small else {})


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

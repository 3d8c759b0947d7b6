"""Writes twins, which are tiny copies of a base for dry runs: same config class and kinds of layers, random
weights, a few parameters."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import UserError
from actors.models.architectures.lookup import architecture_of
from actors.models.architectures.row import config_value
from actors.models.base.loading import load_base, resolve_base
from actors.models.lora.adapters import (
    attach_config,
    base_quantization,
    save_adapter,
    saved_config,
)
from actors.models.lora.heads import make_head, saved_head
from actors.models.lora.merge import merged_state, write_model
from actors.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CAPS = {
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "ffn_config.ffn_hidden_size": 64,
    "q_lora_rank": 64,
    "n_group": 2,
    "topk_group": 1,
}
"""Largest value of each size in a twin; smaller ones are kept."""
EXPERTS = 8
TOP_K = 2
HEAD_DIM = 32
"""The smallest head that vLLM's CPU attention runs."""
HEADS = 4
LAYERS = 2
"""Least number of layers; a twin has as many as it takes for every kind, and one of the dense first ones."""
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


@dataclass(frozen=True)
class Twin:
    """A twin on disk: a tiny copy of a base with random weights."""

    path: str
    changed: dict[str, tuple[Any, Any]]
    """Config key -> (the base's value, the twin's)."""
    parameters: int
    tokenizer_copied: bool
    """False: the base has none that can be read here; a byte tokenizer was written instead."""


def write_twin(base: str | Path | PretrainedConfig, out_dir: str | Path, seed: int = 0) -> Twin:
    """Write a random model of the same architecture, a few layers deep, in float32 safetensors.

    Args:
        base: directory or hub id (only its config and tokenizer are read), or a config.

    Raises:
        UserError: the base can't be read, or is an architecture without a row.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    resolved = None
    if not _is_config(base):
        resolved = resolve_base(ModelSpec(base=str(base), random_init=True, allow_untested=True)).checked()
    config: Any = base if resolved is None else resolved.config
    copied = resolved is not None and _copy_tokenizer(resolved.base_path, out_dir)
    sizes = _shrunk(config)
    if not copied:
        sizes |= _write_byte_tokenizer(config, out_dir)
    before = config.to_dict()
    twin_config = _changed(config, sizes)
    twin_config.architectures = before.get("architectures") or None
    twin_config.save_pretrained(out_dir)
    spec = ModelSpec(base=str(out_dir), random_init=True, allow_untested=True)
    model = load_base(spec, seed=seed)
    _randomise_routers(model, seed)
    if twin_config.architectures is None:
        twin_config.architectures = [type(model).__name__]
        twin_config.save_pretrained(out_dir)
    write_model(model, merged_state(model), out_dir, out_dir)
    after = json.loads((out_dir / "config.json").read_text())
    values = {k: (config_value(before, k), config_value(after, k)) for k in sizes}
    changed = {k: (_shown(old), _shown(new)) for k, (old, new) in values.items() if old != new}
    return Twin(str(out_dir), changed, model.num_parameters(), bool(copied))


def write_adapter_twin(
    adapter_dir: str | Path, twin_dir: str | Path, out_dir: str | Path, seed: int = 0
) -> None:
    """A fresh adapter (B zero) with the targets and ranks of a saved one, for a twin of its base, which is
    quantised as its base was.

    A reward model's twin has a fresh score head.
    """
    trained_on = base_quantization(adapter_dir)
    kind = None if trained_on is None else trained_on[0]
    model = load_base(ModelSpec(base=str(twin_dir), quantization=kind, allow_untested=True))
    try:
        peft = attach_config(model, saved_config(adapter_dir), "twin", seed)
    except ValueError as error:
        raise UserError(f"adapter '{adapter_dir}' can't be rebuilt on a twin: {error}") from error
    scores = saved_head(adapter_dir) is not None
    head = make_head(model.config, "normal", seed, model.device).weight if scores else None
    save_adapter(peft, "twin", out_dir, head)


def _randomise_routers(model: Any, seed: int) -> None:
    """Give routers random weights where they start at 0 (ERNIE's), which sends every token to the same
    experts."""
    import torch

    from actors.models.moe.router_stats import routers_of

    router = architecture_of(model.config).router
    generator = torch.Generator().manual_seed(seed)
    for module in routers_of(model, router.module).values() if router is not None else ():
        for parameter in module.parameters():
            if parameter.ndim == 2 and len(parameter) > 1 and not parameter.any():
                with torch.no_grad():
                    parameter.normal_(
                        std=getattr(model.config, "initializer_range", 0.02), generator=generator
                    )


def _shown(value: Any) -> Any:
    return f"{len(value)} entries" if isinstance(value, list) else value


def _shrunk(config: Any) -> dict[str, Any]:
    """The config keys to change, with their new values. Keys of nested configs have dots."""
    row = architecture_of(config)
    sizes: dict[str, Any] = {k: cap for k, cap in _CAPS.items() if _above(config, k, cap)}
    sizes |= _heads(config)
    if row.is_moe:
        sizes[row.experts_key] = min(EXPERTS, row.n_experts(config))
        top_k = row.top_k(config)
        # The twin's top_k divides every rank that the base's divides.
        sizes[row.top_k_key] = TOP_K if top_k % TOP_K == 0 else 1
        sizes |= _layers_without_experts(config)
    kinds: list[str] = next((k for key in _LAYER_KINDS if (k := getattr(config, key, None))), [])
    n_layers = LAYERS + max((sizes.get(key, 0) for key in _DENSE_FIRST), default=0)
    n_layers = max([n_layers, *(kinds.index(kind) + 1 for kind in kinds)])
    sizes["num_hidden_layers"] = min(config.num_hidden_layers, n_layers)
    if hasattr(config, "moe_layer_end_index"):
        sizes["moe_layer_end_index"] = sizes["num_hidden_layers"] - 1
    for key in _LAYER_KINDS:
        if getattr(config, key, None):
            sizes[key] = list(getattr(config, key))[: sizes["num_hidden_layers"]]
    sizes |= row.twin
    # A config may know one number under two names (attribute_map) and writes only one of them.
    written, names = config.to_dict(), config.attribute_map
    sizes = {names.get(k, k): v for k, v in sizes.items()}
    return {k: v for k, v in sizes.items() if config_value(written, k) not in (None, v)}


_LAYER_KINDS = ("layer_types", "mlp_layer_types")
_DENSE_FIRST = ("first_k_dense_replace", "moe_layer_start_index")


def _heads(config: Any) -> dict[str, Any]:
    """Attention heads of the smallest size, and the width that they make."""
    heads = min(HEADS, config.num_attention_heads)
    grouped = config.num_key_value_heads < config.num_attention_heads
    kv_heads = max(1, heads // 2) if grouped else heads
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "attn_config.kv_n_heads": kv_heads,
        "hidden_size": heads * HEAD_DIM,
        "ffn_config.hidden_size": heads * HEAD_DIM,
        "head_dim": HEAD_DIM,
    }


def _layers_without_experts(config: Any) -> dict[str, Any]:
    """Config keys by which at most the first layer has no experts."""
    sizes: dict[str, Any] = {key: min(1, getattr(config, key, 0) or 0) for key in _DENSE_FIRST}
    if getattr(config, "mlp_only_layers", None):
        sizes["mlp_only_layers"] = [i for i in config.mlp_only_layers if i == 0]
    return sizes | {"decoder_sparse_step": 1}


def _changed(config: Any, sizes: dict[str, Any]) -> Any:
    """The config with other values, in float32; what it derives from them is derived anew."""
    values = config.to_dict()
    # Nested configs are handed over as they are: written as dicts they hold keys that they don't read.
    values |= {name: copy.deepcopy(getattr(config, name)) for name in config.sub_configs}
    for key, value in sizes.items():
        outer, _, inner = key.partition(".")
        if inner:
            setattr(values[outer], inner, value)
        else:
            values[key] = value
    return type(config).from_dict({**values, "dtype": "float32"})


def _above(config: Any, key: str, cap: int) -> bool:
    value = config_value(config, key)
    return isinstance(value, int) and value > cap


def _copy_tokenizer(base: str, out_dir: Path) -> bool:
    """Copy the tokenizer as it is; from the hub it is loaded and saved. False when there is none."""
    from transformers import AutoTokenizer

    if Path(base).is_dir():
        for pattern in _TOKENIZER_FILES:
            for file in Path(base).glob(pattern):
                shutil.copyfile(file, out_dir / file.name)
        return (out_dir / "tokenizer_config.json").is_file()
    try:
        AutoTokenizer.from_pretrained(base).save_pretrained(out_dir)
    except Exception:  # a config without a tokenizer is enough for a dry run
        return False
    return True


def _write_byte_tokenizer(config: Any, out_dir: Path) -> dict[str, Any]:
    """The byte tokenizer of the embedded base, and the config keys that have to follow it."""
    from actors.models.tiny import VOCAB_SIZE, byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(out_dir)
    return {
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def _is_config(base: Any) -> bool:
    from transformers import PretrainedConfig

    return isinstance(base, PretrainedConfig)

"""A tiny random twin of a base for dry runs: same config class, same layer kinds, a few parameters."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import UserError
from actors.models.adapters import attach_config, read_head, save_adapter, saved_config
from actors.models.architectures import architecture_of
from actors.models.heads import make_head
from actors.models.loading import load_base, resolve_base
from actors.models.merge import merged_state, write_model
from actors.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CAPS = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
"""Largest value of each size in a twin; smaller ones stay."""
HEAD_DIM = 32
"""The smallest head that vLLM's CPU attention runs."""
HEADS = 4
LAYERS = 2
"""Of each kind that the first layers have: a dense layer before expert layers is kept as one."""
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
    """A twin on disk."""

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
    resolved = (
        None if _is_config(base) else resolve_base(ModelSpec(base=str(base), random_init=True)).checked()
    )
    config: Any = base if resolved is None else resolved.config
    copied = resolved is not None and _copy_tokenizer(resolved.base_path, out_dir)
    sizes = _shrunk(config)
    if not copied:
        sizes |= _write_byte_tokenizer(config, out_dir)
    before = config.to_dict()
    twin_config = type(config).from_dict({**before, **sizes, "dtype": "float32"})
    twin_config.architectures = before.get("architectures") or None
    twin_config.save_pretrained(out_dir)
    spec = ModelSpec(base=str(out_dir), random_init=True)
    model = load_base(spec, seed=seed)
    if twin_config.architectures is None:
        twin_config.architectures = [type(model).__name__]
        twin_config.save_pretrained(out_dir)
    write_model(model, merged_state(model), out_dir, out_dir)
    after = json.loads((out_dir / "config.json").read_text())
    changed = {
        k: (_shown(before.get(k)), _shown(after.get(k))) for k in sizes if before.get(k) != after.get(k)
    }
    return Twin(str(out_dir), changed, model.num_parameters(), bool(copied))


def write_adapter_twin(
    adapter_dir: str | Path, twin_dir: str | Path, out_dir: str | Path, seed: int = 0
) -> None:
    """A fresh adapter (B zero) with the targets and ranks of a saved one, for a twin of its base.

    A reward model's twin has a fresh score head.
    """
    model = load_base(ModelSpec(base=str(twin_dir)))
    try:
        peft = attach_config(model, saved_config(adapter_dir), "twin", seed)
    except ValueError as error:
        raise UserError(f"adapter '{adapter_dir}' can't be rebuilt on a twin: {error}") from error
    scores = read_head(adapter_dir) is not None
    head = make_head(model.config, "normal", seed, model.device).weight if scores else None
    save_adapter(peft, "twin", out_dir, head)


def _shown(value: Any) -> Any:
    return f"{len(value)} entries" if isinstance(value, list) else value


def _shrunk(config: Any) -> dict[str, Any]:
    """The config keys to change, with their new values."""
    row = architecture_of(config)
    sizes: dict[str, Any] = {k: cap for k, cap in _CAPS.items() if _above(config, k, cap)}
    heads = min(HEADS, config.num_attention_heads)
    grouped = config.num_key_value_heads < config.num_attention_heads
    if row.is_moe and row.top_k(config) > 1 and row.top_k(config) % 2:
        sizes["num_experts_per_tok"] = 1  # a rank that top_k divides is divided by the twin's too
    sizes["num_attention_heads"] = heads
    sizes["num_key_value_heads"] = max(1, heads // 2) if grouped else heads
    sizes["hidden_size"] = heads * HEAD_DIM
    if getattr(config, "head_dim", None) is not None:
        sizes["head_dim"] = HEAD_DIM
    dense_first = min(1, getattr(config, "first_k_dense_replace", 0) or 0)
    sizes["num_hidden_layers"] = min(config.num_hidden_layers, LAYERS + dense_first)
    if dense_first:
        sizes["first_k_dense_replace"] = dense_first
    if row.is_moe and getattr(config, "mlp_only_layers", None):
        sizes["mlp_only_layers"] = [i for i in config.mlp_only_layers if i == 0]
    if row.is_moe and getattr(config, "decoder_sparse_step", 1) != 1:
        sizes["decoder_sparse_step"] = 1
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(config, key, None):
            sizes[key] = list(getattr(config, key))[: sizes["num_hidden_layers"]]
    # A config may know one number under two names (attribute_map) and writes only one of them.
    written = config.to_dict()
    return {k: v for k, v in sizes.items() if k in written and written[k] != v}


def _above(config: Any, key: str, cap: int) -> bool:
    value = getattr(config, key, None)
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

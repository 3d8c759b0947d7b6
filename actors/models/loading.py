"""A base model from a directory or the hub: resolved, checked, loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors.errors import UserError
from actors.models.architectures import (
    ARCHITECTURES,
    REFUSED,
    allow_untested,
    architecture_of,
    unsupported,
)
from actors.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


@dataclass(frozen=True)
class ResolvedBase:
    """What `model.base` turned out to be."""

    base_path: str
    """Directory or hub id of the base model."""
    adapter_path: str | None
    """Directory of the PEFT adapter, when `model.base` named one."""
    config: PretrainedConfig | None
    """The base's config; None when it could not be read."""
    problems: list[str] = field(default_factory=list)
    """Everything that forbids using this model; empty when it may be used."""

    def checked(self) -> ResolvedBase:
        """Itself, or a UserError with every problem."""
        if self.problems:
            raise UserError(self.problems)
        return self


def resolve_base(spec: ModelSpec) -> ResolvedBase:
    """Look at `spec.base` without loading weights. Never raises for what a user can get wrong."""
    base, adapter, problems = _follow_adapter(spec.base)
    if problems:
        return ResolvedBase(base, adapter, None, problems)
    config, problems = _read_config(base, spec.trust_remote_code)
    if config is not None:
        problems += _check_config(config, base, spec.allow_untested)
    if config is not None and not spec.random_init and Path(base).is_dir():
        problems += _check_weights(Path(base))
    return ResolvedBase(base, adapter, config, problems)


def locate_base(spec: ModelSpec) -> tuple[str, str | None]:
    """(directory with the base's files, adapter directory or None); a hub id is downloaded. Reads no config.

    Raises:
        UserError: it is not there.
    """
    base, adapter, problems = _follow_adapter(spec.base)
    if problems:
        raise UserError(problems)
    return str(local_base_dir(base)), adapter


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The base's tokenizer (an adapter's own, where it has one), with a pad token.

    Raises:
        UserError: there is no tokenizer beside the base.
    """
    place, adapter, problems = _follow_adapter(spec.base)
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
        problem = f"model.base: '{place}' has no tokenizer that loads: {_first_line(error)}"
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

    With `spec.random_init` its weights are drawn from `seed`. An adapter named by `spec.base` is not
    applied: see `resolve_base(...).adapter_path` and `actors.models.adapters`. With `shards` above 1, the
    ranks of the process group, each reads and holds only its slices: of all weights, gathered by layers
    (`actors.models.sharding`), or of stacks of experts alone (`actors.models.expert_parallel`). With `mesh`
    the ranks on it hold one model together (`actors.models.tensor_parallel`).

    Raises:
        UserError: the base can't be found, is no causal LM, or is an architecture without a row.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from actors.models.moe import make_routing_deterministic
    from actors.models.sharding import load_weights, shard_loaded

    resolved = resolve_base(spec).checked()
    how: dict[str, Any] = {
        "dtype": getattr(torch, spec.dtype),
        "attn_implementation": spec.attn_implementation,
        "trust_remote_code": spec.trust_remote_code,
    }
    row = None if resolved.config is None else architecture_of(resolved.config)
    if row is not None and spec.attn_implementation == "sdpa":
        how["attn_implementation"] = row.attention
    if row is not None and row.is_moe and row.grouped_experts:
        how["experts_implementation"] = spec.moe.experts_implementation
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
            problem = f"model.base: '{resolved.base_path}' did not load: {_first_line(error)}"
            raise UserError(problem) from error
    model.config.use_cache = False
    # With router logits in the outputs transformers adds its auxiliary loss, also to a frozen router.
    model.config.output_router_logits = False
    make_routing_deterministic(model)
    return (model if shards > 1 else model.to(device)).eval()


def _load_split_layers(resolved: ResolvedBase, mesh: DeviceMesh, how: dict[str, Any]) -> PreTrainedModel:
    from actors.models.targets import meta_model
    from actors.models.tensor_parallel import load_split

    assert resolved.config is not None
    return load_split(type(meta_model(resolved.config)), resolved.base_path, mesh, how)


def _split_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    from actors.models.tensor_parallel import split_layers

    split_layers(model, mesh)


def _load_split_experts(
    resolved: ResolvedBase, device: str | torch.device, how: dict[str, Any]
) -> PreTrainedModel:
    from actors.models.expert_parallel import load_split_experts
    from actors.models.targets import meta_model

    assert resolved.config is not None
    return load_split_experts(type(meta_model(resolved.config)), resolved.base_path, device, how)


def _split_experts(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    from actors.models.expert_parallel import split_experts

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


def is_adapter_dir(path: str | Path) -> bool:
    """True for a directory in PEFT's layout."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def local_base_dir(base_path: str) -> Path:
    """The directory with the base's files; a hub id is downloaded (safetensors, configs, tokenizer)."""
    if Path(base_path).is_dir():
        return Path(base_path)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(base_path, allow_patterns=patterns))
    except Exception as error:
        raise UserError(_not_found(base_path, error)) from error


def _has_tokenizer(directory: str) -> bool:
    return any((Path(directory) / name).is_file() for name in _TOKENIZER_FILES)


def _follow_adapter(base: str) -> tuple[str, str | None, list[str]]:
    """(base, adapter directory or None, problems) of what the user named."""
    path = Path(base).expanduser()
    if path.is_file():
        return base, None, [f"model.base: '{base}' is a file; name the directory of a model or an adapter"]
    if not path.is_dir():
        looks_local = base.startswith((".", "/", "~")) or base.count("/") != 1
        problem = f"model.base: directory '{base}' does not exist" if looks_local else None
        return base, None, [problem] if problem else []
    if not is_adapter_dir(path):
        missing = [] if (path / "config.json").is_file() else [_no_model(path)]
        return str(path), None, missing
    named, problem = _base_of_adapter(path)
    if problem:
        return base, str(path), [f"model.base: {problem}"]
    return named, str(path), []


def _base_of_adapter(path: Path) -> tuple[str, str | None]:
    """(base that an adapter directory names, problem or None)."""
    try:
        named = json.loads((path / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        return "", f"'{path / ADAPTER_CONFIG}' can't be read: {_first_line(error)}"
    if not named:
        return "", f"adapter '{path}' does not name its base (base_model_name_or_path)"
    if is_adapter_dir(named):
        return named, f"adapter '{path}' sits on another adapter, '{named}'; merge that one first"
    if not Path(named).exists() and (named.startswith((".", "/")) or named.count("/") != 1):
        return named, f"the base of adapter '{path}', '{named}', does not exist here"
    return named, None


def _no_model(path: Path) -> str:
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    return f"model.base: '{path}' holds neither config.json nor {ADAPTER_CONFIG} (found: {inside})"


def _read_config(base: str, trust_remote_code: bool) -> tuple[PretrainedConfig | None, list[str]]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code), []
    except OSError as error:
        if Path(base).is_dir():
            return None, [f"model.base: '{base}/config.json' can't be read: {_first_line(error)}"]
        return None, [_not_found(base, error)]
    except Exception as error:  # ValueError, KeyError or transformers' own, by kind of fault
        if "trust_remote_code" in str(error):
            return None, [
                f"model.base: '{base}' brings its own code; it runs only with trust_remote_code: true"
            ]
        return None, [f"model.base: the config of '{base}' is not understood: {_first_line(error)}"]


def _check_config(config: PretrainedConfig, base: str, may_be_untested: bool) -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    classes = list(getattr(config, "architectures", None) or [])
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    causal &= not classes or any(c.endswith(("ForCausalLM", "LMHeadModel")) for c in classes)
    if not causal and config.model_type not in REFUSED:
        kind = ", ".join(classes) or config.model_type
        return [f"model.base: '{base}' is no causal language model ({kind})"]
    problems = _row_problems(config, may_be_untested)
    if getattr(config, "quantization_config", None):
        problems.append(f"model.base: '{base}' is quantised; use its bf16 or fp32 weights")
    return problems


def _row_problems(config: PretrainedConfig, may_be_untested: bool) -> list[str]:
    """Why this architecture can't be used; one without a row gets one where that is allowed."""
    if may_be_untested and config.model_type not in {**ARCHITECTURES, **REFUSED}:
        from actors.models.untested import derived_row

        try:
            allow_untested(derived_row(config))
        except UserError as error:
            return list(error.problems)
        return []
    problem = None if config.model_type in ARCHITECTURES else unsupported(config.model_type)
    return [problem] if problem else []


def _check_weights(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError) as error:
            return [f"model.base: '{index}' can't be read: {_first_line(error)}"]
        missing = sorted(s for s in shards if not (path / s).is_file())
        return [f"model.base: '{path}' lacks {', '.join(missing[:4])} named by its index"] if missing else []
    if any(path.glob("*.safetensors")):
        return []
    pickled = [p.name for p in path.glob("*.bin")]
    hint = f"; '{pickled[0]}' is a pickle and isn't opened: convert it to safetensors" if pickled else ""
    return [f"model.base: '{path}' has no weights in safetensors{hint} (or set model.random_init: true)"]


def _not_found(base: str, error: Exception) -> str:
    return (
        f"model.base: '{base}' is no directory here and could not be had from the hub "
        f"({_first_line(error)}). Check the id, the network, or download it and name the directory"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]

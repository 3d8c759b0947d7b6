"""Finds the base and the adapter that `model.base` names, and checks them without their weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from actors.errors import UserError
from actors.models.architectures.lookup import ARCHITECTURES, REFUSED, allow_untested, unsupported
from actors.models.base.mxfp4 import quant_method
from actors.models.spec import CHECKOUT_BASE, EMBEDDED_BASE, ModelSpec, locate_embedded_base

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names."""
_FILES = (".safetensors", ".bin", ".json", ".gguf", ".pt", ".yaml")
_OWN_FOLDERS = (CHECKOUT_BASE.parts[0], "runs")


@dataclass(frozen=True)
class ResolvedBase:
    """Base, adapter and config that `model.base` stands for, or the reasons why they can't be used."""

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
    base, adapter, problems = follow_adapter(spec.base)
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
    base, adapter, problems = follow_adapter(spec.base)
    if problems:
        raise UserError(problems)
    return str(local_base_dir(base)), adapter


def is_adapter_dir(path: str | Path) -> bool:
    """True for a directory in PEFT's layout."""
    return os.path.isfile(Path(path) / ADAPTER_CONFIG)


def local_base_dir(base_path: str) -> Path:
    """The directory with the base's files; a hub id is downloaded (safetensors, configs, tokenizer)."""
    if os.path.isdir(base_path):
        return Path(base_path)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(base_path, allow_patterns=patterns))
    except Exception as error:
        raise UserError(_not_found(base_path, error)) from error


def follow_adapter(base: str) -> tuple[str, str | None, list[str]]:
    """(base, adapter directory or None, problems) of what the user named."""
    path = Path(base).expanduser()
    # os.path has no error for a name that can be none, such as one of 300 characters; pathlib has.
    if os.path.isfile(path):
        return base, None, [f"model.base: '{base}' is a file; name the directory of a model or an adapter"]
    if not os.path.isdir(path):
        problem = f"model.base: {no_such_directory(base)}" if is_path(base) else None
        return base, None, [problem] if problem else []
    if not is_adapter_dir(path):
        missing = [] if (path / "config.json").is_file() else [_no_model(path)]
        return str(path), None, missing
    named, problem = _base_of_adapter(path)
    if problem:
        return base, str(path), [f"model.base: {problem}"]
    return named, str(path), []


def is_path(name: str) -> bool:
    """True where a name that no directory here has can't be meant as a hub's `org/name`: by its form, or as
    its first folder exists here or is one that Raylign makes."""
    path = Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.suffix in _FILES:
        return True
    return path.parts[0] in _OWN_FOLDERS or os.path.isdir(path.parts[0])


def no_such_directory(name: str) -> str:
    """Words for a directory that is not there: how much of its path is, and what may have been meant."""
    if Path(name) == CHECKOUT_BASE:
        return f"directory '{name}' does not exist here; the embedded base is {EMBEDDED_BASE}"
    path = Path(name).expanduser()
    there = next((parent for parent in path.parents if os.path.isdir(parent)), Path())
    inside = f"; '{there}' is there, without '{path.relative_to(there).parts[0]}'" if there.name else ""
    return f"directory '{name}' does not exist{inside}"


def _base_of_adapter(path: Path) -> tuple[str, str | None]:
    """(base that an adapter directory names, problem or None)."""
    try:
        named = str(json.loads((path / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] or "")
    except (ValueError, KeyError, TypeError) as error:
        return "", f"'{path / ADAPTER_CONFIG}' can't be read: {first_line(error)}"
    if not named:
        return "", f"adapter '{path}' does not name its base (base_model_name_or_path)"
    if Path(named) == CHECKOUT_BASE and not os.path.exists(named):
        # Trained in a checkout, whose results name its base so that they move with it.
        named = locate_embedded_base()
    if is_adapter_dir(named):
        return named, f"adapter '{path}' sits on another adapter, '{named}'; merge that one first"
    if not os.path.exists(named) and is_path(named):
        return named, f"the base of adapter '{path}' is not here: {no_such_directory(named)}"
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
            return None, [f"model.base: '{base}/config.json' can't be read: {first_line(error)}"]
        return None, [_not_found(base, error)]
    except Exception as error:  # ValueError, KeyError or transformers' own, by kind of fault
        if "trust_remote_code" in str(error):
            return None, [
                f"model.base: '{base}' brings its own code; it runs only with trust_remote_code: true"
            ]
        return None, [f"model.base: the config of '{base}' is not understood: {first_line(error)}"]


def _check_config(config: PretrainedConfig, base: str, may_be_untested: bool) -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    classes = list(getattr(config, "architectures", None) or [])
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    causal &= not classes or any(c.endswith(("ForCausalLM", "LMHeadModel")) for c in classes)
    if not causal and config.model_type not in REFUSED:
        kind = ", ".join(classes) or config.model_type
        return [f"model.base: '{base}' is no causal language model ({kind})"]
    problems = _row_problems(config, may_be_untested)
    return problems + _quantized_problems(config, base)


def _quantized_problems(config: PretrainedConfig, base: str) -> list[str]:
    method = quant_method(config)
    if method is None or (method == "mxfp4" and config.model_type == "gpt_oss"):
        return []
    instead = "use its bf16 or fp32 weights, with `model.quantization: nf4` where memory is short"
    if method == "bitsandbytes":
        return [
            f"model.base: '{base}' is quantised by bitsandbytes, which leaves stacked experts in 16 bits and "
            f"writes linear layers in a layout of its own; {instead}"
        ]
    return [f"model.base: '{base}' is quantised ({method}); {instead}"]


def _row_problems(config: PretrainedConfig, may_be_untested: bool) -> list[str]:
    """Reasons why this architecture can't be used; one without a row gets one where that is allowed."""
    if may_be_untested and config.model_type not in {**ARCHITECTURES, **REFUSED}:
        from actors.models.architectures.derived import derived_row

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
            return [f"model.base: '{index}' can't be read: {first_line(error)}"]
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
        f"({first_line(error)}). Check the id, the network, or download it and name the directory"
    )


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]

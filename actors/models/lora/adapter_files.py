"""Adapters on disk, in PEFT's layout: written byte for byte reproducibly, read, checked against a base."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actors.errors import UserError
from actors.models.architectures.meta_model import meta_model
from actors.models.base.digests import base_fingerprint
from actors.models.base.loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from actors.models.files import save_tensors
from actors.models.lora.heads import HEAD_FILE, HEAD_NAME, SCORE_KEY, has_sequence_classifier, saved_head
from actors.models.parallel.fsdp import is_sharded, put_, whole
from actors.models.quantization.quantised_tensor import quantization_of
from actors.models.spec import Quantization

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig

_FINGERPRINT_KEY = "base_fingerprint"
_QUANTIZATION_KEY, _DTYPE_KEY = "base_quantization", "base_dtype"
"""In the metadata of an adapter on a quantised base: `model.quantization` and `model.dtype`."""


def save_adapter(
    peft: PeftModel,
    adapter_name: str,
    directory: str | Path,
    head: torch.Tensor | None = None,
    write: bool = True,
) -> None:
    """Write one adapter in PEFT's layout (config and safetensors), byte for byte reproducible.

    The fingerprint of the base's files goes into the metadata, for `check_adapter_matches_base`, and with a
    quantised base, how that was done. With a
    `head` (1, hidden) it is the adapter of a sequence classifier, as PEFT writes one; for architectures
    of which transformers has no such class, the head is a file of its own next to a plain adapter.

    Collective where the adapter is sharded; `write` is False on ranks that only hand over their slices.
    """
    from peft import TaskType, get_peft_model_state_dict

    require_adapter(peft, adapter_name)
    state = get_peft_model_state_dict(peft, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {k: whole(v).cpu().contiguous().clone() for k, v in sorted(state.items())}
    if not write:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    classifies = head is not None and has_sequence_classifier(peft.get_base_model().config.model_type)
    if head is not None:
        weight = head.detach().float().cpu().clone()
        if classifies:
            tensors[SCORE_KEY] = weight
        else:
            save_tensors({HEAD_NAME: weight}, directory / HEAD_FILE)
    base = peft.get_base_model().config._name_or_path
    fingerprint = base_fingerprint(base) if base and Path(base).is_dir() else None
    metadata = {"format": "pt"} | ({_FINGERPRINT_KEY: fingerprint} if fingerprint else {})
    if kind := quantization_of(peft):
        dtype = str(peft.get_base_model().dtype).removeprefix("torch.")
        metadata |= {_QUANTIZATION_KEY: kind, _DTYPE_KEY: dtype}
    save_tensors(tensors, directory / ADAPTER_WEIGHTS, metadata)
    _sort_metadata(directory / ADAPTER_WEIGHTS)
    config = copy.deepcopy(peft.peft_config[adapter_name])
    config.inference_mode = True
    if classifies:
        config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["score"]
    # PEFT's loaders resolve this name from their own working directory.
    config.base_model_name_or_path = str(Path(base).resolve()) if base and Path(base).is_dir() else base
    config.save_pretrained(str(directory))
    written = json.loads((directory / ADAPTER_CONFIG).read_text())
    # PEFT keeps names in a set, whose order changes with PYTHONHASHSEED.
    for key in ("target_modules", "target_parameters"):
        written[key] = sorted(written[key]) if isinstance(written[key], list) else written[key]
    (directory / ADAPTER_CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def read_head(directory: str | Path) -> torch.Tensor | None:
    """float32 (1, hidden): the scalar head saved with an adapter; None for an adapter without one.

    Raises:
        UserError: a file can't be read, or the head is of another shape than one score.
    """
    from safetensors import safe_open

    found = saved_head(directory)
    if found is None:
        return None
    file, name = found
    with safe_open(file, "pt") as opened:
        head: torch.Tensor = opened.get_tensor(name)
    return head.float()


def load_adapter_weights(peft: PeftModel, adapter_name: str, directory: str | Path) -> None:
    """Set an existing adapter's weights from a saved one with the same targets and ranks.

    Raises:
        UserError: unreadable file, or tensors that are missing, unexpected or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    require_adapter(peft, adapter_name)
    saved = _read_tensors(Path(directory))
    expected = get_peft_model_state_dict(peft, adapter_name=adapter_name, save_embedding_layers=False)
    problems = _compare_shapes(saved, {k: v.shape for k, v in expected.items()}, directory)
    if problems:
        raise UserError(problems)
    if any(map(is_sharded, expected.values())):
        for name, parameter in expected.items():
            put_(parameter, saved[name])
        return
    if any(tensor.is_meta for tensor in expected.values()):
        _put_in(peft, adapter_name, saved)
        return
    set_peft_model_state_dict(peft, saved, adapter_name=adapter_name)


def _put_in(peft: PeftModel, adapter_name: str, saved: Mapping[str, torch.Tensor]) -> None:
    """Saved tensors in place of those of an adapter without storage, which it has on a base without storage
    (PEFT would take them there)."""
    for name, module in peft.named_modules():
        if not name.endswith(f".{adapter_name}"):
            continue
        for leaf, _ in list(module.named_parameters(recurse=False)):
            parameter = nn.Parameter(saved[f"{name.removesuffix(f'.{adapter_name}')}.{leaf}"], False)
            setattr(module, leaf, parameter)


def check_adapter_matches_base(
    adapter_dir: str | Path, config: PretrainedConfig, base_dir: str | Path | None = None
) -> list[str]:
    """Problems that keep a saved adapter from running on a base; empty when it fits.

    Compares every tensor's shape with what PEFT would make on this config, and, where both are
    known, the fingerprint of the base it was trained on with the one in `base_dir`.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    try:
        saved, adapter = _read_tensors(Path(adapter_dir)), saved_config(adapter_dir)
        named = adapter.base_model_name_or_path  # PEFT overwrites it below
        with quiet(), torch.device("meta"):
            peft = get_peft_model(meta_model(config), adapter)
    except UserError as error:
        return error.problems
    except ValueError as error:
        return [f"adapter '{adapter_dir}' is of another base: {str(error).splitlines()[0]}"]
    expected = get_peft_model_state_dict(peft, save_embedding_layers=False)
    problems = _compare_shapes(saved, {k: v.shape for k, v in expected.items()}, adapter_dir)
    if problems:
        return problems
    trained_on, here = _fingerprint_of(Path(adapter_dir)), base_fingerprint(base_dir) if base_dir else None
    if trained_on and here and trained_on != here:
        return [f"adapter '{adapter_dir}' was trained on '{named}', whose weights differ from '{base_dir}'"]
    return []


def quantization_problems(adapter_dir: str | Path, kind: Quantization | None) -> list[str]:
    """Problems of an adapter on a base with `model.quantization: kind`: it was trained on other weights."""
    trained_on = base_quantization(adapter_dir)
    there = None if trained_on is None else trained_on[0]
    if there == kind:
        return []
    wanted = f"model.quantization: {there or 'null'}"
    return [
        f"adapter '{adapter_dir}' was trained with {wanted}, and on the weights of a base with "
        f"{kind or 'none'} it would be another model; set {wanted}, or merge it into its base first "
        "(raylign merge)"
    ]


def base_quantization(adapter_dir: str | Path) -> tuple[Quantization, torch.dtype] | None:
    """Quantization of the base that a saved adapter was trained on, and the dtype that it was computed with;
    None: it was not quantised."""
    found = _metadata_of(Path(adapter_dir))
    if _QUANTIZATION_KEY not in found:
        return None
    kind: Any = found[_QUANTIZATION_KEY]
    return kind, getattr(torch, found[_DTYPE_KEY])


def saved_config(directory: str | Path) -> LoraConfig:
    """PEFT's config of a saved adapter, as one of a causal model: a head of its is loaded by `read_head`.

    Raises:
        UserError: it can't be read, or the adapter is no LoRA.
    """
    from peft import LoraConfig, PeftConfig, TaskType

    try:
        with quiet():
            config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:
        raise UserError(f"adapter '{directory}': {ADAPTER_CONFIG} can't be read ({error})") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"adapter '{directory}' is {config.peft_type}, not LoRA")
    config.inference_mode = False
    if config.task_type == TaskType.SEQ_CLS:
        # Its head is no part of the model here: see `read_head`. PEFT adds the names of any such head.
        config.task_type = TaskType.CAUSAL_LM
        config.modules_to_save = [
            n for n in config.modules_to_save or [] if n not in ("score", "classifier")
        ] or None
    return config


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters of a PeftModel; empty for a plain model."""
    return list(getattr(model, "peft_config", {}))


def require_adapter(model: nn.Module, name: str) -> None:
    """Raise a KeyError unless the model has this adapter."""
    if name not in adapter_names(model):
        raise KeyError(f"no adapter '{name}' (there are: {', '.join(adapter_names(model)) or 'none'})")


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """A and B of a saved adapter."""
    return {name: tensor for name, tensor in _all_tensors(directory).items() if name != SCORE_KEY}


def _all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    file = directory / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"adapter '{directory}' has no {ADAPTER_WEIGHTS}")
    try:
        return load_file(file)
    except Exception as error:
        raise UserError(f"adapter '{file}' is damaged: {error}") from error


def _sort_metadata(file: Path) -> None:
    """Sort the metadata of a file: safetensors writes it in the order of a hash map, which differs by
    process."""
    with open(file, "r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        f.seek(8)
        f.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _fingerprint_of(directory: Path) -> str | None:
    return _metadata_of(directory).get(_FINGERPRINT_KEY)


def _metadata_of(directory: Path) -> dict[str, str]:
    """Empty where there is no adapter."""
    from safetensors import safe_open

    if not (directory / ADAPTER_WEIGHTS).is_file():
        return {}
    with safe_open(directory / ADAPTER_WEIGHTS, "pt") as file:
        return file.metadata() or {}


def _compare_shapes(
    saved: dict[str, torch.Tensor], expected: dict[str, torch.Size], directory: str | Path
) -> list[str]:
    wrong = [
        f"{k} is {tuple(saved[k].shape)}, the base needs {tuple(expected[k])}"
        for k in sorted(saved.keys() & expected.keys())
        if saved[k].shape != expected[k]
    ]
    wrong += [f"{k} has no place in the base" for k in sorted(saved.keys() - expected.keys())]
    wrong += [f"{k} is missing" for k in sorted(expected.keys() - saved.keys())]
    if not wrong:
        return []
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [f"adapter '{directory}' is of another base or other LoRA settings: {wrong[0]}{more}"]


_NOISE = (
    ".*rank_pattern keys did not match.*",  # it matched a parameter; PEFT looks at modules only
    ".*Adapter name .* should not be contained in the prefix.*",
    ".*base_model_name_or_path. was renamed.*",  # from the base's name to that of a model on meta
    ".*were set but no (module|parameter) was matched.*",  # reported by shape, with the adapter's name
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide PEFT's warnings that a user can't act on."""
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield

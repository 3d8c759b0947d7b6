"""LoRA adapters on one frozen base: attach, add, switch per role, save, load, check.

Several roles share a base: each has an adapter of its own, the bare base is the adapter switched off.
Which adapter runs is switched only by `role`; which one trains only by `set_trainable`. PEFT's own
`set_adapter` and `disable_adapter` do both at once and silently drop gradients of the other roles.
"""

from __future__ import annotations

import copy
import json
import warnings
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from actors.errors import UserError
from actors.models import expert_lora
from actors.models.digests import adapter_digest, base_fingerprint, frozen_digest
from actors.models.heads import HEAD_FILE, HEAD_NAME, SCORE_KEY, has_sequence_classifier
from actors.models.loading import ADAPTER_CONFIG
from actors.models.sharding import is_sharded, put_, whole
from actors.models.spec import LoraSpec
from actors.models.targets import meta_model, resolve_targets

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "adapter_digest",
    "adapter_names",
    "adapter_parameters",
    "add_adapter",
    "attach_config",
    "attach_lora",
    "attach_saved",
    "check_adapter_matches_base",
    "copy_adapter_weights",
    "enable_gradient_checkpointing",
    "frozen_digest",
    "load_adapter_weights",
    "lora_config",
    "read_head",
    "role",
    "save_adapter",
    "saved_config",
    "set_trainable",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FINGERPRINT_KEY = "base_fingerprint"


def lora_config(model: PreTrainedModel | PretrainedConfig, lora: LoraSpec) -> LoraConfig:
    """PEFT's config for a LoraSpec on this architecture, with explicit target names.

    Raises:
        UserError: a target matches nothing, the rank can't be divided, or dropout on experts.
    """
    from peft import LoraConfig

    targets = resolve_targets(model, lora.targets, lora)
    if targets.target_parameters and lora.lora_dropout:
        raise UserError(
            f"model.lora.lora_dropout: {lora.lora_dropout} can't be applied to {', '.join(lora.targets)}: "
            "experts and router are parameters, PEFT has no dropout for them; set 0"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=list(targets.target_modules),
        target_parameters=list(targets.target_parameters) or None,
        rank_pattern=targets.rank_pattern,
    )


def attach_lora(
    model: PreTrainedModel, lora: LoraSpec, adapter_name: str = "policy", seed: int = 0
) -> PeftModel:
    """Freeze the base and give it a first, trainable adapter (A drawn from `seed`, B zero)."""
    return attach_config(model, lora_config(model, lora), adapter_name, seed, lora.expert_impl)


def attach_config(
    model: PreTrainedModel,
    config: LoraConfig,
    adapter_name: str = "policy",
    seed: int = 0,
    expert_impl: str = "auto",
) -> PeftModel:
    """Like `attach_lora`, from PEFT's own config."""
    from peft import get_peft_model

    training = model.training
    with _seeded(seed), _quiet():
        peft = get_peft_model(model, config, adapter_name=adapter_name)
    expert_lora.select(peft, expert_impl)
    set_trainable(peft, [adapter_name])
    return peft.train(training)


def attach_saved(
    model: PreTrainedModel,
    adapter_dir: str | Path,
    adapter_name: str = "policy",
    *,
    trainable: bool = True,
    expert_impl: str = "auto",
) -> PeftModel:
    """Like `attach_lora`, with the config and weights of a saved adapter."""
    config = saved_config(adapter_dir)
    peft = attach_config(model, config, adapter_name, 0, expert_impl)
    load_adapter_weights(peft, adapter_name, adapter_dir)
    set_trainable(peft, [adapter_name] if trainable else [])
    return peft


def add_adapter(
    peft: PeftModel,
    adapter_name: str,
    source: LoraSpec | str | Path,
    *,
    trainable: bool = False,
    seed: int = 0,
) -> None:
    """Add one more adapter: fresh from a LoraSpec, or a saved one. No other adapter's state changes.

    Raises:
        UserError: its expert or router targets differ from those of the adapters already there.
    """
    if isinstance(source, LoraSpec):
        config = lora_config(peft.get_base_model(), source)
    else:
        config = saved_config(source)
    _refuse_other_parameters(peft, config, adapter_name)
    grads = {name: p.requires_grad for name, p in peft.named_parameters()}
    with _seeded(seed), _quiet():
        peft.add_adapter(adapter_name, config)
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_(grads.get(name, trainable and f".{adapter_name}." in name))
    expert_lora.wrap_experts(peft)
    if not isinstance(source, LoraSpec):
        load_adapter_weights(peft, adapter_name, source)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters of a PeftModel; empty for a plain model."""
    return list(getattr(model, "peft_config", {}))


def adapter_parameters(peft: PeftModel, adapter_name: str) -> dict[str, nn.Parameter]:
    """The A and B of one adapter, by their full names."""
    _known(peft, adapter_name)
    return {n: p for n, p in peft.named_parameters() if f".{adapter_name}." in n and "lora_" in n}


def set_trainable(peft: PeftModel, names: Collection[str]) -> None:
    """Let exactly these adapters train; base and all other adapters are frozen."""
    for name in names:
        _known(peft, name)
    for full, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in full and any(f".{name}." in full for name in names))


def copy_adapter_weights(peft: PeftModel, source: str, target: str) -> None:
    """Set `target`'s A and B to those of `source` (same shapes)."""
    from_, to = adapter_parameters(peft, source), adapter_parameters(peft, target)
    renamed = {n.replace(f".{source}.", f".{target}."): p for n, p in from_.items()}
    if {n: p.shape for n, p in renamed.items()} != {n: p.shape for n, p in to.items()}:
        raise ValueError(f"adapters '{source}' and '{target}' differ in targets or ranks")
    with torch.no_grad():
        for name, parameter in to.items():
            parameter.copy_(renamed[name])


@contextmanager
def role(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run with the adapter `name`, or with the bare base when None; the old state comes back after.

    Touches only which adapter is computed, never `requires_grad`, so two roles can be run before one
    joint backward. On a plain model only None is possible.

    Raises:
        KeyError: there is no such adapter (a role is never silently the bare base).
    """
    if name is not None:
        _known(model, name)
    with _state(_tuner_layers(model), [(None if name is None else [name], name is None)]):
        yield


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in backward, with the role that was active in forward.

    Plain checkpointing recomputes with whatever adapter is active at backward time: wrong gradients,
    in silence.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def same_role() -> tuple[object, object]:
        layers = _tuner_layers(model)
        now = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        return _state(layers, now), _state(layers, now)

    base.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": same_role}
    )


def save_adapter(
    peft: PeftModel,
    adapter_name: str,
    directory: str | Path,
    head: torch.Tensor | None = None,
    write: bool = True,
) -> None:
    """Write one adapter in PEFT's layout (config and safetensors), byte for byte reproducible.

    The fingerprint of the base's files goes into the metadata, for `check_adapter_matches_base`. With a
    `head` (1, hidden) it is the adapter of a sequence classifier, as PEFT writes one; for architectures
    of which transformers has no such class, the head is a file of its own beside a plain adapter.

    Collective where the adapter is sharded; `write` is False on ranks that only hand over their slices.
    """
    from peft import TaskType, get_peft_model_state_dict
    from safetensors.torch import save_file

    _known(peft, adapter_name)
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
            save_file({HEAD_NAME: weight}, directory / HEAD_FILE)
    base = peft.get_base_model().config._name_or_path
    fingerprint = base_fingerprint(base) if base and Path(base).is_dir() else None
    metadata = {"format": "pt"} | ({_FINGERPRINT_KEY: fingerprint} if fingerprint else {})
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata=metadata)
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
    from safetensors.torch import load_file

    file = Path(directory) / HEAD_FILE
    head = load_file(file)[HEAD_NAME] if file.is_file() else _all_tensors(Path(directory)).get(SCORE_KEY)
    if head is not None and (head.ndim != 2 or len(head) != 1):
        raise UserError(
            f"adapter '{directory}' has a head of shape {tuple(head.shape)}; one score is (1, hidden)"
        )
    return None if head is None else head.float()


def load_adapter_weights(peft: PeftModel, adapter_name: str, directory: str | Path) -> None:
    """Set an existing adapter's weights from a saved one with the same targets and ranks.

    Raises:
        UserError: unreadable file, or tensors that are missing, unexpected or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _known(peft, adapter_name)
    saved = _read_tensors(Path(directory))
    expected = get_peft_model_state_dict(peft, adapter_name=adapter_name, save_embedding_layers=False)
    problems = _compare_shapes(saved, {k: v.shape for k, v in expected.items()}, directory)
    if problems:
        raise UserError(problems)
    if any(map(is_sharded, expected.values())):
        for name, parameter in expected.items():
            put_(parameter, saved[name])
        return
    set_peft_model_state_dict(peft, saved, adapter_name=adapter_name)


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
        with _quiet(), torch.device("meta"):
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


_LAYERS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], list]] = weakref.WeakKeyDictionary()


def _tuner_layers(model: nn.Module) -> list:
    """PEFT's layers of a model; cached, because walking the modules costs more than the switch."""
    names = tuple(adapter_names(model))
    if not names:
        return []
    cached = _LAYERS.get(model)
    if cached is None or cached[0] != names:
        from peft.tuners.tuners_utils import BaseTunerLayer

        cached = (names, [m for m in model.modules() if isinstance(m, BaseTunerLayer)])
        _LAYERS[model] = cached
    return cached[1]


@contextmanager
def _state(layers: list, states: list) -> Iterator[None]:
    """Set (active adapter, disabled) on layers; one state for all, or one each. Restored at exit."""
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    wanted = states * len(layers) if len(states) == 1 else states
    try:
        for layer, (active, disabled) in zip(layers, wanted):
            layer._active_adapter = layer._active_adapter if active is None else active
            layer._disable_adapters = disabled
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _known(model: nn.Module, name: str) -> None:
    if name not in adapter_names(model):
        raise KeyError(f"no adapter '{name}' (there are: {', '.join(adapter_names(model)) or 'none'})")


def saved_config(directory: str | Path) -> LoraConfig:
    """PEFT's config of a saved adapter, as one of a causal model: a head of its is loaded by `read_head`.

    Raises:
        UserError: it can't be read, or the adapter is no LoRA.
    """
    from peft import LoraConfig, PeftConfig, TaskType

    try:
        with _quiet():
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
    """safetensors writes metadata in the order of a hash map, another one in every process."""
    with open(file, "r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        f.seek(8)
        f.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _fingerprint_of(directory: Path) -> str | None:
    from safetensors import safe_open

    with safe_open(directory / ADAPTER_WEIGHTS, "pt") as file:
        return (file.metadata() or {}).get(_FINGERPRINT_KEY)


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


def _refuse_other_parameters(peft: PeftModel, config: LoraConfig, adapter_name: str) -> None:
    wanted = set(config.target_parameters or [])
    for name, other in peft.peft_config.items():
        there = set(other.target_parameters or [])
        if wanted and there and wanted != there:
            raise UserError(
                f"adapter '{adapter_name}' targets {sorted(wanted)}, adapter '{name}' on the same base "
                f"{sorted(there)}: PEFT needs the same experts and router targets in all; "
                "use the same model.lora.targets, or a host of its own for that role"
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PEFT draws A on the CPU from the global generator; leave that as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


_NOISE = (
    ".*rank_pattern keys did not match.*",  # it matched a parameter; PEFT looks at modules only
    ".*Adapter name .* should not be contained in the prefix.*",
    ".*base_model_name_or_path. was renamed.*",  # from the base's name to that of a model on meta
    ".*were set but no (module|parameter) was matched.*",  # reported by shape, with the adapter's name
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide PEFT's warnings that a user can't act on."""
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield

"""LoRA adapters on one frozen base: attach, add, switch per role, save, load, check.

Several roles share a base: each has an adapter of its own, the bare base is the adapter switched off.
Which adapter runs is switched only by `role`; which one trains only by `set_trainable`. PEFT's own
`set_adapter` and `disable_adapter` do both at once and silently drop gradients of the other roles.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from actors.errors import UserError
from actors.models.base.digests import adapter_digest, frozen_digest
from actors.models.lora import experts as expert_lora
from actors.models.lora.adapter_files import (
    adapter_names,
    base_quantization,
    check_adapter_matches_base,
    load_adapter_weights,
    quantization_problems,
    quiet,
    read_head,
    require_adapter,
    save_adapter,
    saved_config,
)
from actors.models.lora.heads import SCORE_KEY
from actors.models.lora.targets import resolve_targets
from actors.models.spec import LoraSpec

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "SCORE_KEY",
    "adapter_digest",
    "adapter_names",
    "adapter_parameters",
    "add_adapter",
    "attach_config",
    "attach_lora",
    "attach_saved",
    "base_quantization",
    "check_adapter_matches_base",
    "copy_adapter_weights",
    "enable_gradient_checkpointing",
    "frozen_digest",
    "load_adapter_weights",
    "lora_config",
    "quantization_problems",
    "read_head",
    "role",
    "save_adapter",
    "saved_config",
    "set_trainable",
]


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
    """Freeze the base and give it a first, trainable adapter (A random from `seed`, B zero)."""
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
    with _seeded(seed), quiet():
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
    with _seeded(seed), quiet():
        peft.add_adapter(adapter_name, config)
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_(grads.get(name, trainable and f".{adapter_name}." in name))
    expert_lora.wrap_experts(peft)
    if not isinstance(source, LoraSpec):
        load_adapter_weights(peft, adapter_name, source)


def adapter_parameters(peft: PeftModel, adapter_name: str) -> dict[str, nn.Parameter]:
    """The A and B of one adapter, by their full names."""
    require_adapter(peft, adapter_name)
    return {n: p for n, p in peft.named_parameters() if f".{adapter_name}." in n and "lora_" in n}


def set_trainable(peft: PeftModel, names: Collection[str]) -> None:
    """Let exactly these adapters train; base and all other adapters are frozen."""
    for name in names:
        require_adapter(peft, name)
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
        require_adapter(model, name)
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


def _refuse_other_parameters(peft: PeftModel, config: LoraConfig, adapter_name: str) -> None:
    wanted = set(config.target_parameters or [])
    for name, other in peft.peft_config.items():
        there = set(other.target_parameters or [])
        if wanted and there and wanted != there:
            raise UserError(
                f"adapter '{adapter_name}' targets {sorted(wanted)}, adapter '{name}' on the same base "
                f"{sorted(there)}: PEFT needs the same experts and router targets in all; "
                "use the same model.lora.targets, or a worker of its own for that role"
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed PEFT's A, which comes from the global generator of the CPU; its state is restored at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

"""A row for an architecture that the table lacks, read off the modules of its model.

Runs only where the user allows it (`model.allow_untested`), and only after a probe has compared the engine's
log-probabilities with the trainer's on this base. Nothing is packed, and no auxiliary loss is added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils.output_capturing import OutputRecorder

from actors.errors import UserError
from actors.models.architectures.row import Architecture, Attention, Router, config_value
from actors.models.spec import TargetGroup

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KINDS: tuple[tuple[TargetGroup, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"attn|attention")),
    ("shared_experts", re.compile(r"shared_(expert|mlp)")),
    ("mlp", re.compile(r"^(mlp|ffn|feed_forward|feedforward)$")),
)
"""Target group -> pattern of a part of a Linear layer's name; the first that fits counts."""
_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def derived_row(config: PretrainedConfig) -> Architecture:
    """The row of an unknown architecture.

    Raises:
        UserError: its model can't be built, or its parts have no names that are understood.
    """
    from actors.models.architectures.meta_model import meta_model

    try:
        net: Any = meta_model(config)
    except Exception as error:
        raise UserError(_cannot(config, f"transformers can't build it ({error})")) from error
    stacks = {name: p for name, p in net.named_parameters() if p.ndim == 3 and ".experts." in name}
    linear = _linear_layers(net, bool(stacks))
    if "attention" not in linear:
        raise UserError(_cannot(config, "no linear layer of its attention was found by name"))
    modules: dict[TargetGroup, tuple[str, ...]] = {"attention": linear.pop("attention")}
    attention: Attention = "sdpa" if getattr(net, "_supports_sdpa", False) else "eager"
    if not stacks:
        modules |= linear
        return Architecture(config.model_type, modules, packs="no", attention=attention, tested=False)
    router, weight = _router(net, config, next(iter(stacks)))
    parameters = {
        "experts": _unique(_suffix(name, 3) for name in stacks),
        "router": (weight,),
        # As target_modules, PEFT would take such names for the experts' old ones.
        **{group: tuple(f"{name}.weight" for name in names) for group, names in linear.items()},
    }
    n_experts = next(iter(stacks.values())).shape[0]
    return Architecture(
        config.model_type,
        modules,
        parameters,
        router,
        experts_key=_key(config, _EXPERTS_KEYS, n_experts),
        top_k_key=_key(config, _TOP_K_KEYS),
        packs="no",
        attention=attention,
        grouped_experts=net._can_set_experts_implementation(),
        tested=False,
    )


def _linear_layers(net: nn.Module, is_moe: bool) -> dict[TargetGroup, tuple[str, ...]]:
    """Group -> suffixes of the Linear layers in it."""
    found: dict[TargetGroup, list[str]] = {}
    for name, module in net.named_modules():
        parts = name.split(".")
        gates = is_moe and any(part.endswith("gate") or part == "router" for part in parts)
        if gates or not isinstance(module, nn.Linear):
            continue
        group = next((g for g, pattern in _KINDS if any(pattern.search(part) for part in parts[:-1])), None)
        if group is not None:
            found.setdefault(group, []).append(_suffix(name, 2))
    return {group: _unique(names) for group, names in found.items()}


def _router(net: Any, config: PretrainedConfig, stack: str) -> tuple[Router, str]:
    """The router: the module next to the experts whose weight has a row for each of them; and that weight's
    suffix."""
    experts = stack.rpartition(".")[0]
    block_name = experts.rpartition(".")[0]
    n_experts = net.get_parameter(stack).shape[0]
    for name, child in net.get_submodule(block_name).named_children():
        for leaf, weight in child.named_parameters():
            if f"{block_name}.{name}" == experts or weight.ndim != 2 or len(weight) != n_experts:
                continue
            recorder = (net._can_record_outputs or {}).get("router_logits")
            at = recorder.index if isinstance(recorder, OutputRecorder) else 0
            bare = type(child) is nn.Linear
            module = _suffix(f"{block_name}.{name}", 2)
            router = Router(module, None if bare else at, experts_at=None, has_aux_loss=False)
            return router, f"{module}.{leaf}"
    raise UserError(_cannot(config, f"no router was found beside {experts}"))


def _suffix(name: str, parts: int) -> str:
    """The last parts of a name, without a layer's number."""
    kept: list[str] = []
    for part in reversed(name.split(".")):
        if part.isdigit() or len(kept) == parts:
            break
        kept.insert(0, part)
    return ".".join(kept)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _key(config: PretrainedConfig, candidates: Iterable[str], value: int | None = None) -> str:
    """The candidate that the config has (with this value)."""
    for key in candidates:
        found = config_value(config, key)
        if found is not None and (value is None or found == value):
            return key
    raise UserError(_cannot(config, f"its config has none of {', '.join(candidates)}"))


def _cannot(config: PretrainedConfig, why: str) -> str:
    return f"model.base: architecture '{config.model_type}' is unknown and can't be tried: {why}"

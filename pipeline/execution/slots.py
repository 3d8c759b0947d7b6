"""Room that engines keep for the LoRA of a stage, where it comes in slots beside the base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.artifacts.weights import Weights

if TYPE_CHECKING:
    from actors.models.spec import ModelSpec
    from actors.sync.spec import SlotSpec


def slots_of(start: Weights, model: ModelSpec) -> SlotSpec:
    """Of a stage that starts from these weights: from its adapter, or from what a new one is made of."""
    from actors.models.base.loading import resolve_base
    from actors.models.lora.adapters import lora_config, saved_config
    from actors.sync.spec import SlotSpec

    if start.adapter is not None:
        config = saved_config(start.adapter)
    else:
        assert model.lora is not None
        config = lora_config(
            resolve_base(model.model_copy(update={"base": start.base})).checked().config, model.lora
        )
    names = [*(config.target_modules or ()), *(config.target_parameters or ())]
    return SlotSpec(max([config.r, *config.rank_pattern.values()]), tuple(_modules(names)))


def _modules(names: Iterable[str]) -> list[str]:
    """Last parts of modules' names: all experts of a layer are one module, under any of their weights."""
    paths = (name.removesuffix(".weight").split(".") for name in names)
    return sorted({"experts" if "experts" in path else path[-1] for path in paths})

"""Bytes of a weight sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipeline.planning.costs.weights import ADAPTER_BYTES

if TYPE_CHECKING:
    from actors.models.facts import BaseSizes
    from actors.models.spec import ModelSpec

PAYLOADS: tuple[Literal["adapter", "merged", "lora"], ...] = ("adapter", "lora", "merged")


def payload_bytes(payload: str, sizes: BaseSizes, model: ModelSpec) -> int:
    """Bytes that a sync sends to one engine.

    `adapter`: A and B in float32. `lora`: A and B in the base's dtype. `merged`: every weight of the touched
    groups in the base's dtype; all of them without LoRA.
    """
    element = 4 if model.dtype == "float32" else 2
    if model.lora is None:
        return sizes.elements * element
    if payload == "merged":
        return sum(w.elements for w in sizes.weights if w.adapter_elements(model.lora, sizes.top_k)) * element
    return sizes.adapter_elements(model.lora) * (ADAPTER_BYTES if payload == "adapter" else element)

"""Weights that a stage starts from or hands on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """A model on disk: the base's directory and, for LoRA, an adapter's."""

    base: str
    adapter: str | None
    fingerprint: str

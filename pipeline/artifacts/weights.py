"""Weights that a stage hands on: a base, and what is on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Weights:
    """What a model is made of: a base directory and, for LoRA, an adapter on it."""

    base: str
    adapter: str | None
    fingerprint: str

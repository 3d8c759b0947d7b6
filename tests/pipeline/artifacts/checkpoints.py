"""Manifests of checkpoints as stages write them."""

from __future__ import annotations

from pipeline.artifacts.identity import Identity
from pipeline.artifacts.manifest import Manifest


def checkpoint_manifest(who: Identity, step: int | None, stage: str = "sft") -> Manifest:
    """That of a stage's checkpoint; its files are not in it yet."""
    return Manifest(
        type="checkpoint",
        stage=stage,
        fingerprint=who.fingerprint,
        inputs=who.inputs,
        config=who.config,
        data={"fingerprint": who.data},
        seed=who.seed,
        step=step,
    )

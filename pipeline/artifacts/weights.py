"""Weights that a stage starts from or hands on."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.artifacts.manifest import model_fingerprint


@dataclass(frozen=True)
class Weights:
    """A model on disk: the base's directory and, for LoRA, an adapter's."""

    base: str
    adapter: str | None
    fingerprint: str
    earlier: str = ""
    """The fingerprint that versions gave it that took samples of all large files; empty: the same."""

    @classmethod
    def on_disk(cls, base: str, adapter: str | None, *read: str) -> Weights:
        """Weights whose fingerprint is of the directories in `read`, joined."""
        now = "-".join(model_fingerprint(directory) for directory in read)
        earlier = "-".join(model_fingerprint(directory, sampled=True) for directory in read)
        return cls(base, adapter, now, "" if earlier == now else earlier)

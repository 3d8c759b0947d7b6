"""Checkpoints that a stage refuses to go on from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.errors import UserError
from pipeline.artifacts.identity import Decision
from pipeline.artifacts.manifest import Manifest, new_directory
from pipeline.stages.offline.train import restore


def test_a_corrupt_checkpoint_is_named_and_not_resumed_from(tmp_path: Path) -> None:
    manifest = Manifest(type="checkpoint", stage="sft", fingerprint="f", step=4)
    with new_directory(tmp_path / "checkpoint-4", manifest) as aside:
        (aside / "optimizer.safetensors").write_bytes(b"moments")
    (tmp_path / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"Moments")
    decision = Decision("partial", checkpoint=tmp_path / "checkpoint-4", manifest=manifest)
    nobody = SimpleNamespace(policy=None)  # Must not be asked: the files are looked at first.
    with pytest.raises(UserError, match=r"checkpoint-4: corrupt checkpoint.*optimizer.*--fresh"):
        restore(nobody, decision)


def test_a_new_stage_starts_at_step_0() -> None:
    assert restore(None, Decision("new")) == 0  # type: ignore[arg-type]

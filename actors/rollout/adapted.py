"""A saved adapter as a version of its base's weights: an engine that has loaded the base takes it as it takes
what a trainer sends, and no merged copy is on any disk.

Both ways of an adapter into an engine add s B A to the base's files in float32 and round once, by the same
code: what is served has the same bits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.errors import InvariantViolation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from actors.rollout.weight_updater import WeightUpdater
    from actors.sync.payload import Payload

VERSION = 0
"""The first after the base's own."""


@dataclass(frozen=True)
class Adapted:
    """An adapter, and the directory of its base."""

    base: str
    payload: Payload | None
    """None: it can't be brought into an engine that has loaded the base."""
    why_not: str = ""


def find_adapted(base: str | None, adapter: str | Path) -> Adapted:
    """An adapter on `base`; None: on the base that it names.

    Raises:
        UserError: the adapter is of another base, or has a head.
    """
    import torch

    from actors.models.lora.merge import base_of_adapter, saved_factors
    from actors.models.lora.merge_files import FileMerge
    from actors.sync.payload import pack_adapter

    directory, config = base_of_adapter(base, adapter)
    reason = _why_not(config, adapter)
    if reason:
        return Adapted(str(directory), None, reason)
    factors = saved_factors(config, adapter)
    if FileMerge.of(directory, config, factors, torch.float32) is None:
        reason = "the files of the base have other names or another form than transformers writes"
        return Adapted(str(directory), None, reason)
    # Nothing rounds the base before the sum.
    return Adapted(str(directory), pack_adapter(VERSION, "float32", factors))


def _why_not(config: PretrainedConfig, adapter: str | Path) -> str:
    from actors.models.architectures.lookup import architecture_of
    from actors.models.base.mxfp4 import is_mxfp4
    from actors.models.lora.adapter_files import base_quantization

    if not architecture_of(config).tested:
        return f"a {config.model_type} model is not in the table, and was not brought into a running engine"
    if is_mxfp4(config) or base_quantization(adapter) is not None:
        return "its base is quantised"
    return ""


def commit_adapted(updater: WeightUpdater, payload: Payload) -> float:
    """Load a staged payload, after which no more are taken; seconds.

    Raises:
        RunFailure: it was not loaded as it was handed over. A merged copy in its place would hide that.
    """
    from actors.sync.protocol import mismatch_in_commit

    began, version = time.monotonic(), payload.manifest.version
    report = updater.commit(version)
    updater.close()
    if wrong := mismatch_in_commit(version, report):
        raise InvariantViolation("rollout", "commit", wrong)
    return time.monotonic() - began

"""Reference log-probabilities of offline stages: what has to be computed, and what an earlier run left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.stages.offline.reference import ReferenceFeed, ReferenceLogps, first_use_order
from pipeline.stages.prepared import PreparedStage
from pipeline.stages.specs.registry import DpoStage, KtoStage, ReferencedStage

if TYPE_CHECKING:
    from pipeline.planning.nodes import Node

CHUNK_BATCHES = 4
"""Training batches per chunk of reference log-probabilities: fewer would wait for Ray more often, more
would delay the first step."""


def make_feed(node: Node, cache: Path, fresh: bool) -> ReferenceFeed:
    """The feed of a stage with a reference; `fresh`: ignore what `cache` holds."""
    spec, reference = node.spec, node.reference
    assert isinstance(spec, ReferencedStage)
    assert reference is not None
    settings: dict[str, Any] = {
        "reference": reference.fingerprint,
        "columns": columns_of(spec),
        "ld_alpha": spec.ld_alpha if isinstance(spec, DpoStage) else None,
        "cache": cache,
        "chunk_rows": CHUNK_BATCHES * spec.batch_size,
        "fresh": fresh,
    }
    assert isinstance(node.prepared, PreparedStage)
    data, held_out = node.prepared.data, node.prepared.eval_data
    train = ReferenceLogps(data, first_use_order(node.prepared.order), **settings)
    if held_out is None:
        return ReferenceFeed(train, None)
    return ReferenceFeed(train, ReferenceLogps(held_out, np.arange(held_out.n_rows), **settings))


def columns_of(spec: ReferencedStage) -> tuple[str, ...]:
    """Names under which a stage's loss reads the reference's log-probabilities, by sequence of a row."""
    if not isinstance(spec, KtoStage):
        return ("ref_chosen_logps", "ref_rejected_logps")
    return ("ref_logps", "ref_kl_logps") if spec.loss_type == "kto" else ("ref_logps",)

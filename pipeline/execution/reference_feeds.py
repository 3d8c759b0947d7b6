"""Reference log-probabilities of offline stages: what has to be computed, and what an earlier run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts.weights import Weights
from pipeline.stages.offline.reference import ReferenceFeed, ReferenceLogps, first_use_order
from pipeline.stages.prepared import PreparedStage

CHUNK_BATCHES = 4
"""Training batches per chunk of reference log-probabilities: fewer would wait for Ray more often, more
would delay the first step."""


def make_feed(stage: PreparedStage, reference: Weights, cache: Path, fresh: bool) -> ReferenceFeed:
    """The feed of a stage that compares with `reference`; `fresh`: ignore what `cache` holds."""
    spec = stage.spec
    settings: dict[str, Any] = {
        "reference": reference.fingerprint,
        "columns": spec.reference_columns,
        "ld_alpha": spec.reference_ld_alpha,
        "cache": cache,
        "chunk_rows": CHUNK_BATCHES * spec.batch_size,
        "fresh": fresh,
    }
    data, held_out = stage.data, stage.eval_data
    train = ReferenceLogps(data, first_use_order(stage.order), **settings)
    if held_out is None:
        return ReferenceFeed(train, None)
    return ReferenceFeed(train, ReferenceLogps(held_out, np.arange(held_out.n_rows), **settings))

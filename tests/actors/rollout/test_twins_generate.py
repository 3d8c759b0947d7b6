"""A dry run's twin of every family starts in an engine and generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from actors.cluster.worker_group import WorkerGroup
from actors.models.architectures.lookup import ARCHITECTURES
from actors.models.architectures.vllm_table import vllm_row
from actors.models.twin import write_twin
from actors.rollout.engine import EngineSpec, SamplingSpec
from actors.rollout.remote import ROLLOUT
from tests.actors.models.test_twin import PUBLISHED

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.architectures]


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_twin_generates(process: WorkerGroup, model_type: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = PUBLISHED.get(model_type, {})
    write_twin(AutoConfig.for_model(model_type, **sizes), tmp_path)
    dtype = vllm_row(model_type).dtypes[0]
    process.build(ROLLOUT, EngineSpec(max_num_seqs=4, max_model_len=128, dtype=dtype)).result()
    process.call_rank(0, "load", str(tmp_path), updatable=True, phase="load")
    made = process.call_rank(0, "generate", [[5, 6, 7]], SamplingSpec(max_tokens=4), [0])
    assert len(made.token_ids) >= 1

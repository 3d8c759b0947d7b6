"""A KTO stage made ready: pairs taken apart, mismatched answers along the first epoch's batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.algorithms.kto import KtoLoss, sequences
from actors.batches.batch import Batch
from actors.errors import UserError
from actors.models.base.loading import load_tokenizer
from actors.models.spec import ModelSpec
from pipeline.config.run_config import RunConfig
from pipeline.stages.prepared import PreparedStage, prepare
from pipeline.stages.specs.registry import KtoStage

BASE = Path(__file__).parents[4] / "assets" / "tiny-moe"
DATA = {"source": "builtin:arithmetic", "split": "preference"}


def ready(rows: int = 5, **settings: Any) -> PreparedStage:
    stage = {"data": {**DATA, "max_rows": rows}, "batch_size": 4, "max_length": 64, **settings}
    config = RunConfig(name="k", model={"base": str(BASE)}, stages={"kto": stage})  # type: ignore[arg-type]
    found = prepare(config.stage("kto"), load_tokenizer(ModelSpec(base=str(BASE))))
    assert isinstance(found, PreparedStage)
    return found


def answers(batch: Batch, place: int) -> list[list[int]]:
    part = sequences(batch, place)
    pieces = zip(part.offsets, part.offsets[1:], strict=False)
    return [part.token_ids[a:b][part.loss_mask[a:b]].tolist() for a, b in pieces]


def test_a_batch_estimates_its_reference_point_from_its_own_answers() -> None:
    stage = ready(eval_data={**DATA, "max_rows": 3})
    assert (stage.data.n_rows, stage.order.steps_per_epoch) == (10, 3)
    for batch in [*(stage.batch(step) for step in range(3)), *(batch for _, batch in stage.eval_batches())]:
        own, mismatched = answers(batch, 0), answers(batch, 1)
        assert mismatched == [own[-1], *own[:-1]]
    assert sorted(stage.data.sequences.columns["label"].tolist()) == [False] * 5 + [True] * 5
    assert stage.loss == KtoLoss()
    assert isinstance(stage.spec, KtoStage)
    assert stage.spec.reference_columns == ("ref_logps", "ref_kl_logps")


def test_without_a_reference_point_a_row_is_one_sequence() -> None:
    stage = ready(loss_type="apo_zero_unpaired")
    assert stage.batch(0).sequences_per_row == 1
    assert isinstance(stage.spec, KtoStage)
    assert stage.spec.reference_columns == ("ref_logps",)


def test_a_single_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "1+1=?", "completion": "2", "label": true}\n')
    with pytest.raises(UserError, match="kto needs two rows at least"):
        ready(data=str(path))

"""Rows that several stages train on are read and made into tokens once, and are then each stage's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from actors.models.base.loading import load_tokenizer
from actors.models.spec import ModelSpec
from pipeline.config.run_config import RunConfig
from pipeline.stages import prepared
from pipeline.stages.prepared import Reader, prepare, read_records

BASE = Path(__file__).parents[3] / "assets" / "tiny-moe"
PAIRS = {"data": {"source": "builtin:arithmetic", "split": "preference", "max_rows": 6}, "batch_size": 2}


def config_of(**stages: Any) -> RunConfig:
    return RunConfig(name="r", model={"base": str(BASE)}, stages=stages)  # type: ignore[arg-type]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Identities of the records that were made into tokens."""
    asked: list[int] = []
    real = prepared.encode_rows

    def counted(records: Any, *args: Any) -> Any:
        asked.append(id(records))
        return real(records, *args)

    monkeypatch.setattr(prepared, "encode_rows", counted)
    return asked


def test_two_stages_on_the_same_pairs_share_what_is_equal_and_keep_what_is_theirs(encoded: list[int]) -> None:
    config = config_of(reward={**PAIRS, "max_length": 64}, dpo={**PAIRS, "max_length": 18})
    tokenizer, reader = load_tokenizer(ModelSpec(base=str(BASE))), Reader()
    records = {name: read_records(config.stage(name), reader) for name in config.stages}
    assert records["reward"].train is records["dpo"].train
    shared = {name: prepare(config.stage(name), tokenizer, records[name], reader) for name in config.stages}
    assert len(encoded) == 1
    assert reader._encoded == {}  # nobody will ask again: they take no more memory
    for name, stage in shared.items():
        alone = prepare(config.stage(name), tokenizer)
        assert stage.data.fingerprint == alone.data.fingerprint
        assert stage.data.stats == alone.data.stats
    assert shared["dpo"].data.stats.truncated
    assert not shared["reward"].data.stats.truncated


def test_stages_of_other_seeds_or_kinds_read_for_themselves() -> None:
    data = {"source": "builtin:arithmetic", "split": "train", "max_rows": 4}
    stages = {name: {"type": "sft", "data": data, "batch_size": 2} for name in ("a", "b", "c")}
    stages["b"]["seed"] = 7
    stages["d"] = {**PAIRS, "type": "reward"}
    config, reader = config_of(**stages), Reader()
    first, other, same, pairs = (read_records(config.stage(name), reader).train for name in config.stages)
    assert first is same
    assert first is not other
    assert pairs.kind == "preference"


def test_a_row_that_the_template_refuses_is_told_for_each_of_its_stages(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n' * 2)
    stage = {"data": {"source": str(tmp_path / "rows.jsonl"), "on_bad_row": "skip"}, "batch_size": 2}
    config = config_of(reward={**stage, "max_length": 3}, dpo={**stage, "max_length": 64})
    tokenizer, reader = load_tokenizer(ModelSpec(base=str(BASE))), Reader()
    records = {name: read_records(config.stage(name), reader) for name in config.stages}
    with pytest.raises(UserError, match="no rows left to train on"):
        prepare(config.stage("reward"), tokenizer, records["reward"], reader)
    assert prepare(config.stage("dpo"), tokenizer, records["dpo"], reader).data.skipped.total == 0

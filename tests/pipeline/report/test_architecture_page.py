"""The page of architectures follows the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.models.architectures.lookup import ARCHITECTURES, REFUSED
from pipeline.report.architecture_page import FIGURES, PAGE, page, read_results
from tests import architecture_results

ROOT = Path(__file__).parents[3]


def test_the_page_is_in_date_with_the_table_and_the_last_results() -> None:
    made = page(read_results(ROOT))
    assert (ROOT / PAGE).read_text() == made, "run `make docs`"


def test_the_page_has_every_row_and_every_reason() -> None:
    text = page({})
    assert all(text.count(f"| `{name}` |") == 3 for name in ARCHITECTURES)
    assert all(f"| `{name}` | {why} |" in text for name, why in REFUSED.items())
    assert "`dbrx`: `experts` can't be adapted: its experts read each other's weights" in text
    assert "| `dbrx` | attention | yes | yes | file | no |" in text


def test_figures_that_tests_record_are_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "docs" / "architectures.json"
    file.parent.mkdir()
    architecture_results.record("mixtral", merge=1.0)
    monkeypatch.setenv(architecture_results.VARIABLE, str(file))
    architecture_results.record("mixtral", merge=1.234e-6)
    architecture_results.record("mixtral", fresh=0.0)
    assert json.loads(file.read_text())["figures"] == {"mixtral": {"fresh": 0.0, "merge": 1.23e-06}}
    text = page(read_results(tmp_path))
    assert "| `mixtral` |  | 1e-06 |  |  |  | 0 |" in text
    assert ", vllm 0." in text
    assert set(FIGURES) >= {"merge", "fresh"}

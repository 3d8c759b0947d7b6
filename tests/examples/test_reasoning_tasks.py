"""Tasks of reasoning-gym as rows, where the library is there; a message where it is not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from examples import reasoning_tasks

THERE = importlib.util.find_spec("reasoning_gym") is not None


@pytest.mark.skipif(THERE, reason="reasoning-gym is installed")
def test_without_the_library_rows_and_rewards_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        reasoning_tasks.write(tmp_path, ["chain_sum"], 4, 2, 0, {})
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        reasoning_tasks.score(["7"], ["{}"])


@pytest.mark.skipif(not THERE, reason="reasoning-gym is not installed")
def test_rows_are_scored_by_their_tasks(tmp_path: Path) -> None:
    settings = {"chain_sum": {"max_terms": 3}}
    reasoning_tasks.write(tmp_path, ["chain_sum", "letter_counting"], 8, 4, 0, settings)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("prompts", "test")
    }
    assert {name: len(part) for name, part in rows.items()} == {"prompts": 16, "test": 8}
    asked = [{row["prompt"][0]["content"] for row in part} for part in rows.values()]
    assert not asked[0] & asked[1]
    entries = [row["entry"] for row in rows["test"]]
    answers = [row["answer"] for row in rows["test"]]
    assert reasoning_tasks.score(answers, entries) == [1.0] * 8
    assert (
        reasoning_tasks.score([[{"role": "assistant", "content": one}] for one in answers], entries)
        == [1.0] * 8
    )
    assert max(reasoning_tasks.score(["none of it"] * 8, entries)) == 0.0

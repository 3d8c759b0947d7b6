"""Processes that were replaced, as a run notes them."""

from __future__ import annotations

import json
from pathlib import Path

from actors.cluster import Replaced
from pipeline.monitoring.replacements import FILE, Replacements

RANK = Replaced("policy", 1, "its process died", "update 3 of ppo (call 9)", 2.5)
ENGINE = Replaced("rollout", 0, "no answer within 60 s (limits.generate)", "", 4.25)


def test_each_replacement_is_a_line_with_stage_and_step_and_all_sessions_are_counted(tmp_path: Path) -> None:
    first = Replacements(tmp_path, print)
    assert (first.count, first.said()) == (0, "")
    assert not (tmp_path / FILE).exists()
    first.at("ppo", 4)
    first.add(RANK)
    first.add(ENGINE)
    first.at("eval")
    first.add(ENGINE)
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("ppo", 4), ("ppo", 4), ("eval", None)]
    assert rows[0]["time"] > 0
    told = {key: rows[0][key] for key in ("role", "rank", "reason", "place", "seconds")}
    assert Replaced(**told) == RANK
    assert first.said() == "replaced: rollout 2, policy 1 (11.0 s in all); replacements.jsonl says why"
    second = Replacements(tmp_path, print)
    second.add(RANK)
    assert (second.count, second.said().partition(" (")[0]) == (4, "replaced: policy 1")


def test_a_line_that_cannot_be_written_is_said_and_counted(tmp_path: Path) -> None:
    said: list[str] = []
    replacements = Replacements(tmp_path / "gone", said.append)
    replacements.add(RANK)
    (line,) = said
    assert "replacements.jsonl: not written: [Errno 2]" in line
    assert replacements.count == 1

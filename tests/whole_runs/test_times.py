"""Times of a run that was stopped and went on, while the wall clock was set again and again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.whole_runs.runs import ENVIRONMENT, ROOT, command_of, when
from tests.whole_runs.test_demo import config

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]

JUMPING = """
import itertools, sys, time
real, day = time.time, itertools.cycle([0, 86400, -86400, 40000])

def jumping():
    ours = sys._getframe(1).f_globals.get("__name__", "").startswith(("pipeline", "actors"))
    return real() + next(day) if ours else real()

time.time = jumping
"""
"""A clock that is set by a day between any two looks of this project at it. Ray keeps the real one."""


def session(command: list[str], directory: Path, stop_at: Path | None = None) -> tuple[str, float]:
    """A session of a run, stopped when a file has a line; what it said, and its seconds."""
    began = time.monotonic()
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(directory / "clock"), str(ROOT)])}
    process = subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if stop_at is not None:
        when(process, lambda: stop_at.is_file() and stop_at.stat().st_size > 0)
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == (0 if stop_at is None else 75), said
    return said, time.monotonic() - began


def seconds_in(value: Any) -> list[float]:
    """Every time in run.json that is no stamp."""
    if not isinstance(value, dict):
        return []
    own = [float(v) for k, v in value.items() if k in ("seconds", "wait")]
    own += [float(v) for v in value.get("startup", {}).values()]
    return own + [one for inner in value.values() for one in seconds_in(inner)]


@pytest.mark.slow
def test_times_add_up_over_sessions_and_don_t_mind_the_wall_clock(tiny_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluation = {"data": {"source": "builtin:arithmetic", "split": "test"}, "max_rows": 8, "models": ["sft"]}
    content = config(tiny_base, run, eval=evaluation | {"sampling": {"max_tokens": 4}})
    sft = content["stages"]["sft"] | {"max_steps": 40, "save_steps": 100}
    command = command_of(tmp_path, content | {"stages": {"sft": sft}, "roles": {"policy": {"workers": 1}}})
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPING)

    _, first = session(command, tmp_path, run / "sft" / "metrics.jsonl")
    stopped = json.loads((run / "run.json").read_text())
    assert all(0 <= one <= first + 0.1 for one in seconds_in(stopped)), stopped
    (saved,) = (json.loads(p.read_text()) for p in run.glob("sft/checkpoint-*/manifest.json"))
    assert 0 < saved["seconds"] <= stopped["stages"]["sft"]["seconds"] + 0.1

    said, second = session(command, tmp_path)
    done = json.loads((run / "run.json").read_text())
    stage = done["stages"]["sft"]
    assert all(0 <= one <= first + second + 0.1 for one in seconds_in(done)), done
    assert stage["seconds"] > saved["seconds"], "the first session's part is in it"
    assert stage["wait"] > stopped["stages"]["sft"]["wait"] > 0
    assert stage["seconds"] == round(json.loads((run / "sft" / "manifest.json").read_text())["seconds"], 1)

    again, _ = session(command, tmp_path)
    row = re.compile(r"sft +[\d.]+ % .* 8 +(\d+ s) +(\d+ s)")
    assert [row.search(text)[1] for text in (said, again)] == [f"{stage['seconds']:.0f} s"] * 2  # type: ignore[index]
    skipped = json.loads((run / "run.json").read_text())
    assert skipped["stages"]["sft"] | {"state": "done"} == stage | {"state": "done"}
    assert skipped["eval"]["sft"]["seconds"] == done["eval"]["sft"]["seconds"]
    for path in (run / "logs" / "trace").glob("*.jsonl"):
        for call in map(json.loads, path.read_text().splitlines()):
            assert 0 <= call["end"] - call["start"] <= first + second

"""The report of a run that works: how it is written, and what it may cost."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.artifacts.run_directory import RunDirectory
from pipeline.cli.app import main
from pipeline.report import build_report
from pipeline.report.while_running import ReportWhileRunning, yield_everything


def wait_for(reached: Callable[[], object], limit: float = 60) -> None:
    deadline = time.monotonic() + limit
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begun(root: Path) -> Path:
    """A run at step 12 of 100 of its only stage."""
    (root / "sft").mkdir(parents=True)
    run = {"name": "new", "stages": {"sft": {"state": "running", "total_steps": 100}}}
    (root / "run.json").write_text(json.dumps(run))
    rows = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 13)]
    (root / "sft" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return root


def test_it_says_how_far_the_run_is_and_as_of_when(tmp_path: Path) -> None:
    run, notes = begun(tmp_path / "run"), []
    live = ReportWhileRunning(run, notes.append, first_s=0.0, every_s=1000.0)
    live.start()
    wait_for((run / "report.html").is_file)
    live.stop()
    assert re.search(r"running, sft: step 12 of 100, as of \d\d:\d\d<", (run / "report.html").read_text())
    assert notes == []
    assert (run / "plots" / "sft-loss.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_renewed_and_leaves_nothing_when_it_is_ended_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.report.while_running.TIMES_ITS_WORK", 0)
    run, notes = begun(tmp_path / "run"), []
    live = ReportWhileRunning(run, notes.append, first_s=0.0, every_s=0.0)
    live.start()
    wait_for(lambda: live.process is not None)
    first = live.process
    wait_for(lambda: live.process is not first, 120)
    began = time.monotonic()
    live.stop()
    assert time.monotonic() - began < 5
    assert live.process is not None
    assert live.process.poll() is not None
    left = {path.name for path in run.rglob("*") if path.is_file()}
    assert left == {"run.json", "metrics.jsonl", "report.html", "sft-loss.png"}
    assert notes == []


def test_its_process_has_the_lowest_priority() -> None:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        yield_everything(child)
        assert os.getpriority(os.PRIO_PROCESS, child) == 19
        assert Path(f"/proc/{child}/oom_score_adj").read_text().strip() == "1000"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_report_that_cannot_be_written_is_one_note_and_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.report.while_running.TIMES_ITS_WORK", 0)
    run, notes = begun(tmp_path / "run"), []
    (run / "report.html").mkdir()
    (run / "report.html" / "mine").touch()
    live = ReportWhileRunning(run, notes.append, first_s=0.0, every_s=0.0)
    live.start()
    wait_for(lambda: notes)
    first = live.process
    wait_for(lambda: live.process is not first, 120)
    live.stop()
    (said,) = notes
    assert "could not be renewed while the run works" in said
    assert "Is a directory" in said


def test_a_report_by_hand_of_a_run_that_works_says_so_also_between_its_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(tmp_path / "run")
    (run / "run.json").write_text('{"name": "new", "stages": {"sft": {"state": "done"}}}')
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert RunDirectory.in_use(run)
        assert main(["report", str(run)]) == 0
    assert "▶ running, as of " in (run / "report.html").read_text()
    assert not RunDirectory.in_use(run)
    assert main(["report", str(run)]) == 0
    assert "✓ done</span>" in (run / "report.html").read_text()


def test_a_run_that_was_killed_is_as_of_its_last_word(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    last = datetime(2026, 3, 4, 10, 31).timestamp()
    for path in (run / "run.json", run / "sft" / "metrics.jsonl"):
        os.utime(path, (last, last))
    assert "running, sft: step 12 of 100, as of 10:31" in build_report(run).read_text()

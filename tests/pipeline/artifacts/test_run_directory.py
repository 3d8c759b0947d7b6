"""One run's directory: never two at once, never somebody else's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.errors import UserError
from pipeline.artifacts.run_directory import RunDirectory, clear_stage, drop_previous
from pipeline.execution.stop import StopRequests


def test_state_is_written_and_read_back(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "r", "demo").opened() as run:
        run.record_stage("sft", state="done", seconds=1.5)
    with RunDirectory(tmp_path / "r", "demo").opened() as again:
        assert again.state["stages"]["sft"] == {"state": "done", "seconds": 1.5}


def test_a_second_run_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "r", "demo").opened() as run:
        run.save()
        with (
            pytest.raises(UserError, match="in use by process"),
            RunDirectory(tmp_path / "r", "demo").opened(),
        ):
            pass


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.artifacts.run_directory import RunDirectory\n"
        f"with RunDirectory(Path({str(tmp_path / 'r')!r}), 'demo').opened() as run:\n"
        "    run.save(); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    with pytest.raises(UserError, match="in use"), RunDirectory(tmp_path / "r", "demo").opened():
        pass
    process.kill()
    process.wait()
    with RunDirectory(tmp_path / "r", "demo").opened() as run:
        assert run.name == "demo"


def test_another_runs_directory_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "r", "first").opened() as run:
        run.save()
    with (
        pytest.raises(UserError, match="belongs to the run 'first'"),
        RunDirectory(tmp_path / "r", "b").opened(),
    ):
        pass


def test_a_directory_with_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(UserError, match="not a run directory"),
        RunDirectory(tmp_path, "demo").opened(fresh=True),
    ):
        pass
    assert (tmp_path / "thesis.tex").exists()


def test_a_broken_run_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": ')
    with pytest.raises(UserError, match=r"run\.json: not readable"), RunDirectory(tmp_path, "demo").opened():
        pass


def test_fresh_starts_anew(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "r", "demo").opened() as run:
        run.record_stage("sft", state="done")
        (run.path / "sft").mkdir()
    with RunDirectory(tmp_path / "r", "demo").opened(fresh=True) as run:
        assert run.state["stages"] == {}
        assert not (run.path / "sft").exists()


def test_an_old_stage_is_kept_until_its_successor_is_complete(tmp_path: Path) -> None:
    stage = tmp_path / "sft"
    stage.mkdir()
    (stage / "manifest.json").write_text("old")
    clear_stage(stage)
    assert not stage.exists()
    stage.mkdir()
    (stage / "half").write_text("an attempt that was cut")
    clear_stage(stage)
    assert (tmp_path / ".sft.previous" / "manifest.json").read_text() == "old"
    drop_previous(stage)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_or_the_stop_file_asks_for_a_stop(tmp_path: Path) -> None:
    with StopRequests(tmp_path / "STOP") as stop:
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.asked()
    with StopRequests(tmp_path / "STOP") as stop:
        (tmp_path / "STOP").touch()
        assert stop.asked()


def test_run_json_is_plain_json_for_programs(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "r", "demo").opened() as run:
        run.record(seconds=3.0)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["name"] == "demo"

"""One run's directory: never two at once, never somebody else's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from actors.errors import UserError
from pipeline.artifacts.identity import Identity, decide
from pipeline.artifacts.run_directory import RunDirectory, clear_stage, drop_previous


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


DAMAGED = {
    "cut": b'{"name": ',
    "not UTF-8": b'{"name": "d\xe9mo"}',
    "a list": b"[]",
    "no name": b"{}",
    "a name that is no text": b'{"name": 3}',
    "stages that are no mapping": b'{"name": "demo", "stages": null}',
    "a stage that is no mapping": b'{"name": "demo", "stages": {"sft": 1}}',
    "deep": b"[" * 100_000,
}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Directory of a run that has begun a stage."""
    with RunDirectory(tmp_path / "r", "demo").opened() as run:
        (run.path / "config.yaml").write_text("name: demo\nstages: {sft: {}}\n")
        (run.path / "sft").mkdir()
        return run.path


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_goes_on_where_a_damaged_run_json_was_removed_as_advised(
    begun: Path, content: bytes, fresh: bool
) -> None:
    record = begun / "run.json"
    record.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json: not readable .* Remove it and run the same config"):
        RunDirectory(begun, "demo").refuse_foreign()
    with pytest.raises(UserError, match="not readable"):
        RunDirectory(begun, "demo").read()
    record.unlink()
    with RunDirectory(begun, "demo").opened(fresh=fresh) as run:
        assert run.state == {"name": "demo", "stages": {}, "eval": {}}
        assert (run.path / "sft").exists() != fresh


def test_a_directory_without_run_json_is_nobody_elses(begun: Path) -> None:
    (begun / "run.json").unlink()
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory(begun, "another").refuse_foreign()
    (begun / "config.yaml").write_bytes(b"\xff: [")
    with pytest.raises(UserError) as refused:
        RunDirectory(begun, "demo").refuse_foreign()
    advised = str(refused.value).partition("put ")[2].partition(" into its run.json")[0]
    (begun / "run.json").write_text(advised)
    with RunDirectory(begun, "demo").opened() as run:
        assert (run.path / "sft").exists()


def test_a_config_of_the_same_name_alone_makes_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: demo")
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory(tmp_path, "demo").refuse_foreign()


@pytest.mark.parametrize("left", [".run.json.tmp", "logs", "submitted.json"])
def test_what_a_full_disk_leaves_before_the_first_run_json_is_no_obstacle(tmp_path: Path, left: str) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / left).touch()
    with RunDirectory(tmp_path, "demo").opened() as run:
        assert run.name == "demo"


def test_a_directory_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UserError, match=r"can't be read \(Permission denied\)"):
        RunDirectory(tmp_path, "demo").refuse_foreign()


def test_the_work_of_a_damaged_manifest_is_redone_where_its_directory_was_removed_as_advised(
    tmp_path: Path,
) -> None:
    identity, stage = Identity({}, {}, "data", 0), tmp_path / "sft"
    stage.mkdir()
    (stage / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match=f"Remove the directory {stage} to redo this work"):
        decide(stage, identity)
    shutil.rmtree(stage)
    assert decide(stage, identity).state == "new"


def test_fresh_leaves_what_a_link_leads_to(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "precious").touch()
    (begun / "linked").symlink_to(tmp_path / "disk")
    with RunDirectory(begun, "demo").opened(fresh=True):
        assert not (begun / "linked").is_symlink()
    assert (tmp_path / "disk" / "precious").exists()


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
    (stage / "answers").write_text("paid for")
    clear_stage(stage, keep=["answers", "others"])
    assert [(path.name, path.read_text()) for path in stage.iterdir()] == [("answers", "paid for")]
    clear_stage(stage)
    assert (tmp_path / ".sft.previous" / "manifest.json").read_text() == "old"
    drop_previous(stage)
    assert list(tmp_path.iterdir()) == []


def test_run_json_is_plain_json_for_programs(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "r", "demo").opened() as run:
        run.record(seconds=3.0)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["name"] == "demo"

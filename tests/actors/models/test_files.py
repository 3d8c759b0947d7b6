"""Directories of models appear whole or not at all, and their files have the umask's mode."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.errors import RunFailure, UserError
from actors.models.files import new_model, save_tensors, writing


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_weights_have_the_umasks_mode(tmp_path: Path, umask: int) -> None:
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("there", ["new", "empty", "link"])
def test_a_model_appears_when_it_is_complete(tmp_path: Path, there: str) -> None:
    out = tmp_path / "out" / "model"
    if there != "new":
        out.mkdir(parents=True)
    named = out
    if there == "link":
        named = tmp_path / "link"
        named.symlink_to(out)
    with new_model(named) as aside:
        (aside / "config.json").write_text("{}")
        assert not list(out.glob("*"))
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert named.is_symlink() == (there == "link")


def fill_the_disk(out: Path) -> None:
    with new_model(out) as aside, writing(out):
        (aside / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with pytest.raises(RunFailure, match=r"cannot write .*No space left"):
            fill_the_disk(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_what_a_kill_leaves_does_not_look_like_a_model_and_is_replaced(tmp_path: Path) -> None:
    script = (
        "import sys, time; from actors.models.files import new_model\n"
        "with new_model(sys.argv[1]) as aside:\n"
        "    (aside / 'config.json').write_text('{}'); (aside / 'old').touch(); print('in', flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".model.unfinished"]
    with new_model(tmp_path / "model") as aside:
        (aside / "config.json").write_text("{}")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "model",
        "model/config.json",
    ]


def test_places_that_hold_something_are_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    for name in "abcd":
        (tmp_path / "full" / name).touch()
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    for name, said in {
        "file": "is a file; name a new or empty directory",
        "full": r"is not empty \(it holds a, b, c, ...\); name a new or empty directory .* or remove that",
        "mounted": "is a mount point; name a new directory inside it",
        "file/below": r"can't be written \(Not a directory\)",
    }.items():
        with pytest.raises(UserError, match=said), new_model(tmp_path / name):
            pass
    assert not list(tmp_path.glob(".*"))

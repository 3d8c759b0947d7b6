"""Scratch directories go with their process, also with one that is killed; nobody else's are touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.cluster.scratch import LOCK, LONGEST_SOCKET, OWN_NAME, PREFIX, Scratch, sweep, unfit
from actors.errors import UserError

OTHER = "from actors.cluster.scratch import Scratch; print(Scratch().path, flush=True); input()"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def other(place: Path, repository: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process with a scratch directory of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER],
        env=os.environ | {"PYTHONPATH": str(repository)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_removed_one_leaves_nothing(place: Path) -> None:
    scratch = Scratch()
    (scratch.path / "sub").mkdir()
    (scratch.path / "sub" / "file").write_text("x")
    scratch.remove()
    assert list(place.iterdir()) == []


def test_one_of_a_living_process_stays(other: tuple[subprocess.Popen[str], Path]) -> None:
    process, path = other
    Scratch().remove()
    assert process.poll() is None
    assert path.is_dir()


def test_one_of_a_process_killed_with_9_goes_with_the_next(
    other: tuple[subprocess.Popen[str], Path], place: Path
) -> None:
    process, path = other
    (path / "model").mkdir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.is_dir()
    Scratch().remove()
    assert list(place.iterdir()) == []


def test_one_that_is_left_stays_until_the_next_is_made(place: Path) -> None:
    scratch = Scratch()
    scratch.leave()
    assert scratch.path.is_dir()
    Scratch().remove()
    assert list(place.iterdir()) == []


def test_directories_that_only_look_like_one_stay(place: Path) -> None:
    kept = [place / f"{PREFIX}of-somebody", place / f"{PREFIX}elsewhere", place / f"{PREFIX}link"]
    kept[0].mkdir()
    kept[1].mkdir()
    (kept[1] / LOCK).write_text("another-machine")
    target = place / "target"
    target.mkdir()
    (target / LOCK).write_text((Scratch().path / LOCK).read_text())
    kept[2].symlink_to(target)
    (place / f"{PREFIX}file").write_text("x")
    sweep(place)
    assert all(path.is_dir() for path in kept)
    assert (place / f"{PREFIX}file").is_file()


def test_sockets_go_where_their_paths_fit(place: Path) -> None:
    room = LONGEST_SOCKET - OWN_NAME - len(str(place))
    fitting, longer = Scratch(room), Scratch(room + 1)
    assert fitting.path.parent == place
    assert len(str(fitting.path)) + room == LONGEST_SOCKET
    assert longer.path.parent == Path("/tmp")
    fitting.remove()
    longer.remove()
    assert not longer.path.exists()


@pytest.mark.parametrize("name", ["quote's", 'double"', "back\\slash", "fünf", "line\nbreak"])
def test_sockets_go_elsewhere_from_a_path_that_ray_does_not_take(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (place / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(place / name))
    sockets, files = Scratch(8), Scratch()
    assert (sockets.path.parent, files.path.parent) == (Path("/tmp"), place / name)
    sockets.remove()
    files.remove()


def test_a_path_with_a_space_is_as_good_as_any(place: Path) -> None:
    assert unfit(Path("/tmp/my files (2)"), 8) is None


def test_sockets_go_where_ray_tmpdir_says_and_files_do_not(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(place / "rays"))
    sockets, files = Scratch(8), Scratch()
    assert (sockets.path.parent, files.path.parent) == (place / "rays", place)
    sockets.remove()
    files.remove()


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (
            "/" + "x" * 100,
            r"^RAY_TMPDIR: .*: it is longer than the 82 bytes .*; set it to another path, or unset it$",
        ),
        (
            "/tmp/it's",
            r"^RAY_TMPDIR: /tmp/it's can't hold Ray's files: it is with characters that it doesn't take",
        ),
        ("/proc/none", r"^RAY_TMPDIR: /proc/none can't be made \(No such file or directory\)"),
        ("/dev/null", r"^RAY_TMPDIR: /dev/null can't be made \(File exists\)"),
        ("/proc", r"^RAY_TMPDIR: temporary files can't be made in /proc"),
    ],
)
def test_a_ray_tmpdir_that_cannot_serve_is_named_with_what_would(
    place: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, says: str
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", chosen)
    with pytest.raises(UserError, match=says):
        Scratch(8)


def test_without_any_place_the_variable_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/a', '/b']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(UserError, match=r"^TMPDIR: no directory .*'/a', '/b'.*; set it to one$"):
        Scratch()

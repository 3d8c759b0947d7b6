"""Artifacts appear whole or not at all, and are recognised by their content."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.errors import RunFailure, UserError
from pipeline.artifacts.manifest import (
    MANIFEST,
    Manifest,
    full_disks,
    model_fingerprint,
    new_directory,
    read_manifest,
    recover,
    verify,
    write_json,
)
from pipeline.artifacts.weights import Weights


def manifest(**more: object) -> Manifest:
    return Manifest(type="adapter", stage="sft", fingerprint="f", **more)


def test_an_artifact_has_its_files_and_their_digests(tmp_path: Path) -> None:
    with new_directory(tmp_path / "adapter", manifest()) as aside:
        (aside / "weights").write_bytes(b"12345")
        assert not (tmp_path / "adapter").exists()
    found = read_manifest(tmp_path / "adapter")
    assert found is not None
    assert found.files["weights"].bytes == 5
    assert verify(tmp_path / "adapter", found) == []


def test_an_error_while_writing_leaves_the_old_artifact(tmp_path: Path) -> None:
    with new_directory(tmp_path / "adapter", manifest()) as aside:
        (aside / "weights").write_text("old")

    def fail_half_way() -> None:
        with new_directory(tmp_path / "adapter", manifest()) as aside:
            (aside / "weights").write_text("half of the new")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert (tmp_path / "adapter" / "weights").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def save_and_die(directory: Path, moment: str, call: int) -> int:
    """Save in a process of its own that is killed before the n-th call of `moment`; its exit status."""
    child = os.fork()
    if not child:
        module, name = moment.split(".")
        real, calls = getattr(sys.modules[module], name), itertools.count(1)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        try:
            setattr(sys.modules[module], name, dying)
            with new_directory(directory, manifest()) as aside:
                (aside / "weights").write_text("new")
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment", ["os.fsync", "os.rename", "os.replace"])
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_artifact(tmp_path: Path, moment: str) -> None:
    """kill -9 before the n-th call of what moves bytes to disk, for every n that a save has."""
    with new_directory(tmp_path / "a", manifest()) as aside:
        (aside / "weights").write_text("old")
    for call in range(1, 40):
        code = save_and_die(tmp_path / "a", moment, call)
        recover(tmp_path / "a")
        found = read_manifest(tmp_path / "a")
        assert found is not None
        assert verify(tmp_path / "a", found) == []
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert (tmp_path / "a" / "weights").read_text() in ("old", "new")
    assert code == 0, "the save has more steps than this test kills at"
    assert (tmp_path / "a" / "weights").read_text() == "new"
    assert call > 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with new_directory(tmp_path / "adapter", manifest()) as aside:
        (aside / "weights").write_text("good")
        (aside / "config").write_text("good")
    found = read_manifest(tmp_path / "adapter")
    assert found is not None
    (tmp_path / "adapter" / "weights").write_text("evil")
    (tmp_path / "adapter" / "config").unlink()
    problems = "\n".join(verify(tmp_path / "adapter", found))
    assert "weights does not match its digest" in problems
    assert "config is missing" in problems


LARGE = 200 << 20
"""Bytes of a file of which versions before took 18 samples."""


def sparse(path: Path, size: int) -> None:
    """A file of zeros that takes no room on disk."""
    with path.open("wb") as handle:
        handle.truncate(size)


def flip(path: Path, at: int) -> None:
    """Flip one bit, or flip it back."""
    with path.open("r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 1]))


def test_every_flipped_byte_of_a_large_file_is_found(tmp_path: Path) -> None:
    with new_directory(tmp_path / "checkpoint-2", manifest()) as aside:
        sparse(aside / "optimizer.safetensors", LARGE)
    found = read_manifest(tmp_path / "checkpoint-2")
    assert found is not None
    assert verify(tmp_path / "checkpoint-2", found) == []
    for at in (0, (7 << 20) + 12_345, LARGE // 3, LARGE - 1):
        flip(tmp_path / "checkpoint-2" / "optimizer.safetensors", at)
        assert len(verify(tmp_path / "checkpoint-2", found)) == 1, at
        flip(tmp_path / "checkpoint-2" / "optimizer.safetensors", at)
    assert verify(tmp_path / "checkpoint-2", found) == []


@pytest.mark.parametrize("size", [5, LARGE])
def test_digests_of_the_versions_before_are_still_compared(tmp_path: Path, size: int) -> None:
    """The digests were written by the version before, of files of zeros."""
    digest = {5: "fdcff4bae704b09eb084c8632481c610", LARGE: "86b3f29bfaedfa0528c9a585d8a5e97c"}[size]
    sparse(tmp_path / "weights", size)
    earlier = manifest(files={"weights": {"bytes": size, "digest": digest}})
    assert verify(tmp_path, earlier) == []
    flip(tmp_path / "weights", 0)
    assert len(verify(tmp_path, earlier)) == 1


def test_a_file_that_can_not_be_read_is_a_problem_like_others(tmp_path: Path) -> None:
    with new_directory(tmp_path / "adapter", manifest()) as aside:
        (aside / "weights").touch()
    found = read_manifest(tmp_path / "adapter")
    assert found is not None
    (tmp_path / "adapter" / "weights").unlink()
    (tmp_path / "adapter" / "weights").symlink_to("/proc/self/mem")  # Empty, and reading it is an EIO.
    (problem,) = verify(tmp_path / "adapter", found)
    assert "cannot be read (Input/output error)" in problem


def test_a_broken_manifest_is_the_users_to_look_at(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"type": "adap')
    with pytest.raises(UserError, match="manifest cannot be read"):
        read_manifest(tmp_path)


def test_a_disk_that_is_full_ends_in_a_failure_that_says_so(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with new_directory(tmp_path / "a", manifest()), open("/dev/full", "w") as full:
            full.write("x")

    with pytest.raises(RunFailure, match="No space left"):
        fill_the_disk()
    assert not (tmp_path / "a").exists()


def test_a_models_identity_is_its_weights_and_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a" * 100)
    first = model_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert model_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"a" * 99 + b"b")
    assert model_fingerprint(tmp_path) != first


def test_files_that_a_run_writes_hold_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"accuracy": float("nan"), "ci95": (0.0, float("inf")), "at": tmp_path})
    assert json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail) == {
        "accuracy": None,
        "ci95": [0.0, None],
        "at": str(tmp_path),
    }


@pytest.mark.parametrize("marker", ["adapter_config.json", "manifest.json", None])
def test_adapters_and_what_raylign_wrote_are_read_whole_and_bases_by_samples(
    tmp_path: Path, marker: str | None
) -> None:
    sparse(tmp_path / "model.safetensors", LARGE)
    if marker:
        (tmp_path / marker).write_text("{}")
    now, earlier = model_fingerprint(tmp_path), model_fingerprint(tmp_path, sampled=True)
    flip(tmp_path / "model.safetensors", (7 << 20) + 12_345)
    assert (model_fingerprint(tmp_path) != now) == bool(marker)
    assert model_fingerprint(tmp_path, sampled=True) == earlier
    known = Weights.on_disk("base", None, str(tmp_path))
    assert known.fingerprint == model_fingerprint(tmp_path)
    assert known.earlier == (earlier if marker else "")


def test_what_is_small_keeps_the_fingerprint_that_earlier_versions_gave_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"a" * 100)
    assert Weights.on_disk("base", None, str(tmp_path)).earlier == ""


@pytest.mark.parametrize(("code", "file"), [(errno.ENOSPC, None), (errno.EROFS, "/data/config.yaml")])
def test_a_full_disk_is_told_with_the_file_or_the_directory_and_other_errors_stay(
    code: int, file: str | None
) -> None:
    def fail(code: int) -> None:
        with full_disks(Path("/data/run")):
            raise OSError(code, os.strerror(code), file)

    named = re.escape(f"cannot write {file or '/data/run'}: {os.strerror(code)}")
    with pytest.raises(RunFailure, match=named):
        fail(code)
    with pytest.raises(ConnectionRefusedError):
        fail(errno.ECONNREFUSED)

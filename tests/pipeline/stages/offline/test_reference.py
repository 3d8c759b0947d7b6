"""Kept log-probabilities of a reference are a cache: nothing that happens to it ends a run."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.stages.offline import reference
from pipeline.stages.offline.reference import ReferenceFeed, ReferenceLogps

ROWS = 6
VALUES = np.arange(2.0 * ROWS).reshape(ROWS, 2)


class OneRank:
    """The face of the reference's ranks: row numbers in, log-probabilities out."""

    def __init__(self) -> None:
        self.asked = 0

    def logprobs(self, rows: np.ndarray, ld_alpha: float | None) -> Any:
        self.asked += 1
        return SimpleNamespace(result=lambda: VALUES[rows].reshape(-1))


def logps(cache: Path) -> ReferenceLogps:
    data = SimpleNamespace(n_rows=ROWS, fingerprint="data", batch=lambda rows: rows)
    return ReferenceLogps(
        data,  # type: ignore[arg-type]
        np.arange(ROWS),
        reference="base",
        columns=("ref_chosen_logps", "ref_rejected_logps"),
        ld_alpha=None,
        cache=cache,
        chunk_rows=4,
    )


def computed(cache: Path) -> tuple[ReferenceLogps, int]:
    """Log-probabilities of all rows, and how many chunks had to be computed for them."""
    one, rank = logps(cache), OneRank()
    one.start(rank)  # type: ignore[arg-type]
    one.finish()
    assert np.array_equal(one.columns(np.arange(ROWS))["ref_rejected_logps"], VALUES[:, 1])
    assert one.cached
    return one, rank.asked


def test_a_later_run_reads_what_an_earlier_one_kept(tmp_path: Path) -> None:
    first, asked = computed(tmp_path)
    assert asked == 2
    assert first.notes == []
    assert computed(tmp_path)[1] == 0
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_disk_that_cannot_be_written_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "mkdir", fails) if call == "mkdir" else (os, call, fails)))
        found, _ = computed(tmp_path)
    assert len(ReferenceFeed(found, None).notes()) == 1
    assert os.strerror(code) in found.notes[0]
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_directory_is_a_note(tmp_path: Path) -> None:
    (tmp_path / ".cache").touch()
    found, _ = computed(tmp_path / ".cache" / "reference")
    assert "not kept for the next run" in found.notes[0]


@pytest.mark.parametrize("damage", ["manifest", "file", "missing"])
def test_a_damaged_artifact_is_computed_again_and_replaced(tmp_path: Path, damage: str) -> None:
    place = computed(tmp_path)[0].path
    if damage == "manifest":
        (place / "manifest.json").write_bytes(b"\xff{")
    elif damage == "file":
        (place / reference.FILE).write_bytes(b"x" * (place / reference.FILE).stat().st_size)
    else:
        (place / reference.FILE).unlink()
    again, asked = computed(tmp_path)
    assert asked == 2
    assert len(again.notes) == 1
    assert "computed again" in again.notes[0]
    assert computed(tmp_path)[1] == 0


def test_runs_that_write_it_at_once_all_go_on_and_leave_one_whole_artifact(tmp_path: Path) -> None:
    notes: list[str] = []
    failures: list[BaseException] = []

    def one_run() -> None:
        try:
            notes.extend(computed(tmp_path)[0].notes)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one_run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert notes == []
    assert len(list(tmp_path.iterdir())) == 1
    assert computed(tmp_path)[1] == 0


def test_what_a_killed_run_left_half_written_is_removed_after_a_day(tmp_path: Path) -> None:
    place = logps(tmp_path).path
    old, young = (tmp_path / f".{place.name}.{name}.tmp" for name in ("old", "young"))
    for left in (old, young):
        left.mkdir()
    two_days_ago = time.time() - 2 * reference.ABANDONED_SECONDS
    os.utime(old, (two_days_ago, two_days_ago))
    computed(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, place.name]

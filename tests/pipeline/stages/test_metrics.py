"""Lines of metrics.jsonl: windows of steps, also of a run that goes on inside one."""

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from actors.errors import RunFailure
from pipeline.stages.metrics import MetricsLog, read_metrics


def logged(path: Path, steps: range, resume_at: int = 0, checkpoint: Path | None = None) -> MetricsLog:
    log = MetricsLog(path / "metrics.jsonl", resume_at=resume_at, every=5, checkpoint=checkpoint)
    for step in steps:
        log.add(step, {"loss": float(step), "beta": step / 10})
    return log


def test_a_run_that_goes_on_inside_a_window_logs_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """A checkpoint after step 7; steps 8 and 9 are lost, and done again."""
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    logged(tmp_path, range(1, 8)).save(checkpoint)
    logged(tmp_path, range(8, 10), 7, checkpoint).close()
    logged(tmp_path, range(8, 11), 7, checkpoint).close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines == [{"step": 5, "loss": 3.0, "beta": 0.5}, {"step": 10, "loss": 8.0, "beta": 1.0}]


def test_a_checkpoint_between_windows_holds_no_steps(tmp_path: Path) -> None:
    logged(tmp_path, range(1, 6)).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_disk_that_takes_no_further_line_ends_the_run_with_its_name(tmp_path: Path) -> None:
    """A full disk is made by the largest size that this process may give a file."""
    log = logged(tmp_path, range(1, 6))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = log.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
    try:
        with pytest.raises(RunFailure, match=r"cannot write \S+metrics.jsonl: File too large"):
            log.write({"step": 6, "loss": 0.5})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [line["step"] for line in read_metrics(log.path)] == [5]
    assert log.path.stat().st_size == size + 5


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_lines_are_json_where_a_value_is_no_number(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "samples.jsonl", resume_at=0, every=1)
    line = {"step": 1, "prompt": "NaN", "reward": math.nan, "more": {"all": [math.inf, 1.0]}}
    log.write(line)
    log.close()
    (text,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert strict(text) == {"step": 1, "prompt": "NaN", "reward": None, "more": {"all": [None, 1.0]}}


def test_a_run_goes_on_over_metrics_that_are_no_numbers(tmp_path: Path) -> None:
    """As an earlier version wrote them (NaN), and as this one does (null)."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "kl": NaN, "loss": 3.0}\n{"step": 10, "kl": null}\n')
    (tmp_path / "logging_window.json").write_text('[{"kl": null, "loss": 1.0}, {"kl": NaN, "loss": 3.0}]')
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_at=12, every=5, checkpoint=tmp_path)
    line = log.add(15, {"kl": 0.0, "loss": 5.0})
    log.save(tmp_path)
    log.close()
    assert line is not None
    assert line["loss"] == 3.0
    lines = [strict(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 5, "kl": None, "loss": 3.0},
        {"step": 10, "kl": None},
        {"step": 15, "kl": None, "loss": 3.0},
    ]


def test_a_window_that_is_open_at_a_checkpoint_is_json_too(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_at=0, every=5)
    log.add(1, {"kl": math.inf})
    log.save(tmp_path)
    assert strict((tmp_path / "logging_window.json").read_text()) == [{"kl": None}]


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("resume_at", [0, 5])
def test_a_kill_while_lines_are_dropped_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, resume_at: int
) -> None:
    logged(tmp_path, range(1, 11)).close()
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, moment.removeprefix("os."), killed)
        with pytest.raises(KeyboardInterrupt):
            logged(tmp_path, range(0), resume_at)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    logged(tmp_path, range(0), resume_at).close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [5][: resume_at // 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_lines_that_are_cut_short_or_damaged_are_left_out_and_the_others_kept(tmp_path: Path) -> None:
    rows = [json.dumps({"step": step, "loss": 1.0}).encode() for step in (1, 2, 3)]
    damaged = [b"\xff\xfe\x00", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b"[" * 100_000, b""]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([rows[0], *damaged, *rows[1:], b'{"step": 4, "lo']))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    logged(tmp_path, range(0), 2).close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert path.read_bytes().endswith(b"}\n")

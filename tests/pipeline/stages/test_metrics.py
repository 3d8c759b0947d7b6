"""Lines of metrics.jsonl: windows of steps, also of a run that goes on inside one."""

from pathlib import Path

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

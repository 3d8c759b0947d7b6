"""Progress on a terminal and without one. The clock is the test's."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.monitoring.formatting import duration
from pipeline.monitoring.phases import counted, phase
from pipeline.monitoring.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain(clock: Clock) -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    return Progress(Console(file=text, force_terminal=False, width=80), clock=clock), text


def test_without_a_terminal_a_line_comes_every_few_seconds(clock: Clock) -> None:
    progress, text = plain(clock)
    with progress:
        progress.stage("sft", total=100)
        for step in range(1, 101):
            clock.now += 0.25
            progress.step(step, {"loss": 1 / step, "tokens_per_second": 9812.4})
        progress.done()
    lines = text.getvalue().splitlines()
    assert lines[0] == "▶ sft  100 steps"
    assert lines[1] == "▶ sft  step 1/100 · loss 1.000 · 9,812 tokens/s · 0.2 s"
    assert lines[2] == "▶ sft  step 21/100 · loss 0.048 · 9,812 tokens/s · 20 s left"
    assert lines[-1] == "✓ sft  step 100/100 · loss 0.010 · 9,812 tokens/s · 25 s"
    assert len(lines) == 7


def test_an_online_stage_shows_reward_kl_length_and_seconds_instead_of_its_loss(clock: Clock) -> None:
    progress, text = plain(clock)
    figures = {
        "loss": 0.0,
        "reward": 0.6123,
        "kl": 0.00412,
        "completions/mean_length": 9.25,
        "time/step": 3.9,
    }
    with progress:
        progress.stage("ppo", total=40)
        clock.now += 4.0
        progress.step(1, figures)
    assert "▶ ppo  step 1/40 · reward 0.612 · kl 0.0041 · length 9.2 · 3.9 s/step · 4.0 s" in text.getvalue()


def test_time_left_counts_only_what_this_process_did(clock: Clock) -> None:
    progress, text = plain(clock)
    with progress:
        progress.stage("dpo", total=100)
        progress.step(90)
        clock.now += 6.0
        progress.step(92)
    assert "step 92/100 · 24 s left" in text.getvalue()


def test_a_stage_that_an_exception_ends_is_marked_as_failed(clock: Clock) -> None:
    progress, text = plain(clock)

    def break_off() -> None:
        with progress:
            progress.stage("dpo", total=3)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        break_off()
    assert text.getvalue().splitlines()[-1].startswith("✗ dpo  failed")


def test_skipped_stages_and_notes_are_one_line_each_and_markup_is_text(clock: Clock) -> None:
    progress, text = plain(clock)
    with progress:
        progress.stage("sft")
        progress.done("skipped", "already done")
        progress.note("saved [bold]to[/bold] " + "x" * 100)
    lines = text.getvalue().splitlines()
    assert lines[-2] == "↷ sft  skipped · already done"
    assert lines[-1].startswith("saved [bold]to[/bold] xxx")


def test_a_table_holds_every_cell(clock: Clock) -> None:
    progress, text = plain(clock)
    progress.table("Held-out prompts", ["model", "accuracy"], [["base", "24.6 %"], ["sft [x]", 0.5]])
    shown = text.getvalue()
    for cell in ("Held-out prompts", "model", "24.6 %", "sft [x]", "0.5"):
        assert cell in shown


def test_on_a_terminal_the_running_stage_is_redrawn_and_the_finished_one_stays(clock: Clock) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, color_system=None)
    with Progress(console, clock=clock) as progress:
        progress.stage("sft", total=10)
        progress.step(4, {"loss": 0.5})
        assert progress._display is not None
        progress._display.refresh()
        progress.done()
    shown = text.getvalue()
    assert "step 4/10 · loss 0.500" in shown
    assert "✓ sft  step 4/10" in shown


def test_durations_read_like_people_say_them() -> None:
    assert [duration(s) for s in (0.4, 9.96, 48.3, 187, 3599.7, 8100)] == [
        "0.4 s",
        "10.0 s",
        "48 s",
        "3:07 min",
        "1:00 h",
        "2:15 h",
    ]


def test_a_step_without_a_stage_is_a_programming_error(clock: Clock) -> None:
    progress, _ = plain(clock)
    with pytest.raises(RuntimeError, match="call stage"):
        progress.step(1)


def test_without_a_terminal_a_phase_is_a_line_and_how_far_it_is_now_and_then(clock: Clock) -> None:
    progress, text = plain(clock)
    progress.console.width = 200
    with progress:
        phase("reading data")
        clock.now += 2.1
        phase("sft: tokenizing 9,000 rows")
        for _ in counted(range(9000), "tokenized", 9000):
            clock.now += 0.002
        phase("sft: tokenizing 9,000 rows")
    assert text.getvalue().splitlines() == [
        "· reading data",
        "· sft: tokenizing 9,000 rows (after 2.1 s)",
        "· sft: tokenizing 9,000 rows: tokenized 2,560 of 9,000 rows (after 7.2 s)",
        "· sft: tokenizing 9,000 rows: tokenized 5,120 of 9,000 rows (after 12 s)",
        "· sft: tokenizing 9,000 rows: tokenized 7,680 of 9,000 rows (after 17 s)",
    ]


def test_on_a_terminal_a_phase_is_one_live_line_with_its_seconds_until_the_first_step(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    progress = Progress(console, clock=clock)
    progress.stage("sft", total=9)
    progress.phase("starting the engines")
    progress.count("1 of 2")
    clock.now += 75
    assert "sft starting the engines · 1 of 2 · 1:15 min" in rendered(progress)
    progress.step(1, {"loss": 2.0})
    assert "step 1/9 · loss 2.000" in rendered(progress)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_what_is_said_while_nothing_shows_progress_is_said_to_nobody() -> None:
    phase("reading data")
    assert list(counted(range(1000), "tokenized", 1000)) == list(range(1000))


def rendered(progress: Progress) -> str:
    """The live line as text."""
    console = Console(file=io.StringIO(), width=100)
    console.print(progress._render())
    return console.file.getvalue()  # type: ignore[attr-defined]

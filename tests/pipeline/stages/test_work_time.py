"""Seconds of a stage: work over all of its sessions, and what each waited for before."""

from __future__ import annotations

from pipeline.artifacts.identity import Decision
from pipeline.artifacts.manifest import Manifest
from pipeline.stages.context import WorkTime, seconds_before


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_waiting_is_no_work_and_ends_with_the_first_step() -> None:
    clock = Clock()
    spent = WorkTime(clock)
    clock.now += 7
    assert (spent.work, spent.wait) == (None, 7)
    spent.begin(0.0)
    clock.now += 30
    assert (spent.work, spent.wait) == (30, 7)


def test_a_resumed_stage_adds_up_to_what_its_checkpoint_took() -> None:
    clock = Clock()
    saved = Manifest(type="checkpoint", stage="sft", fingerprint="f", step=4, seconds=100.0)
    spent = WorkTime(clock)
    spent.begin(seconds_before(Decision("partial", manifest=saved)))
    clock.now += 20
    assert spent.work == 120


def test_a_stage_that_runs_again_begins_at_0() -> None:
    old = Manifest(type="adapter", stage="sft", fingerprint="f", seconds=100.0)
    assert seconds_before(Decision("changed", manifest=old)) == seconds_before(Decision("new")) == 0

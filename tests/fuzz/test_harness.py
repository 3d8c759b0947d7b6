"""The harness itself: what counts as a find, and what does not."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
from hypothesis import strategies as st

from actors.errors import RunFailure, UserError
from tests.fuzz import harness
from tests.fuzz.harness import Feed, refused


def test_results_and_messages_are_no_finds() -> None:
    def mistaken() -> None:
        raise UserError("a.yaml: no such file")

    def failed() -> None:
        raise RunFailure("policy", "load", "no room")

    assert [refused(lambda: 1), refused(mistaken), refused(failed)] == [False, True, True]


def test_other_exceptions_and_unreadable_messages_are_finds() -> None:
    def damaged() -> None:
        raise KeyError("x")

    def silent() -> None:
        raise UserError([" "])

    def wordy() -> None:
        raise UserError("x" * 30_000)

    with pytest.raises(KeyError):
        refused(damaged)
    with pytest.raises(AssertionError, match="an empty problem"):
        refused(silent)
    with pytest.raises(AssertionError, match="a message of 30,000 characters"):
        refused(wordy)


def test_what_works_too_long_is_a_find_also_where_every_exception_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def works() -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    monkeypatch.setattr(harness, "MOST_SECONDS", 0.3)
    with pytest.raises(AssertionError, match="took more than"):
        refused(works)


def mapped(size: int) -> None:
    """Take memory from the kernel: what an earlier test has given back may be in the heap still."""
    with mmap.mmap(-1, size) as memory:
        memory.write(b"x" * size)


def test_what_takes_too_much_memory_is_a_find_and_far_too_much_is_not_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "MOST_MEMORY", 64 << 20)
    with pytest.raises(AssertionError, match="MiB of memory"):
        refused(lambda: mapped(128 << 20))
    monkeypatch.setattr(harness, "ROOM", 1 << 30)
    with pytest.raises(MemoryError):
        refused(lambda: bytearray(2 << 30))


def test_a_target_gets_its_examples_and_as_many_inputs_as_it_says_always_the_same() -> None:
    def fed() -> list[Any]:
        given: list[Any] = []
        feed = Feed(None)
        feed(given.append, st.integers(), inputs=20, examples=["a"])
        assert feed.executions == len(given) <= 21
        return given

    assert fed()[0] == "a"
    assert len(fed()) > 10
    assert fed() == fed()


def test_a_target_with_time_gets_inputs_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BATCH", 5)
    feed = Feed(0.5)
    feed(lambda value: None, st.integers())
    assert feed.executions > 5

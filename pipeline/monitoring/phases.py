"""Lets whoever works say what is being done, and whoever shows it hear of it.

Before a run's first step lie a dozen things that take seconds each, from a file's rows to Ray, in as many
rooms. None of them is handed a console: they say `phase("starting Ray")`, and what shows progress at that
time (`shown_by`) hears it. Where nothing does, it is said to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")

EVERY = 512
"""Items between two words on how many are done: a hundredth of a second's work at least."""


class Listener(Protocol):
    """Something that shows what is being done."""

    def phase(self, text: str) -> None:
        """Another thing begins."""

    def count(self, text: str) -> None:
        """Progress of it: `tokenized 512 of 6,400 rows`."""


_listeners: list[Listener] = []
"""The last one hears. Of the process, not of a thread: Ray is started by a thread of its own."""


@contextmanager
def shown_by(listener: Listener) -> Iterator[None]:
    """Let `listener` hear what is said meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def phase(text: str) -> None:
    """Say what begins now: `tokenizing sft`."""
    if _listeners:
        _listeners[-1].phase(text)


def counted(items: Iterable[T], done: str, total: int) -> Iterator[T]:
    """The same rows; how many are `done` (rendered, tokenized) is said now and then."""
    for at, item in enumerate(items):
        if at and not at % EVERY and _listeners:
            _listeners[-1].count(f"{done} {at:,} of {total:,} rows")
        yield item

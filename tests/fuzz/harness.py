"""Feeds made-up input to code that reads what users and files hold: a result or a message comes out.

A target is a test that takes the fixture `feed` and calls `feed(action, strategy)`. `make test` runs a fixed
number of inputs, always the same ones; `make fuzz` new ones for `FUZZ_SECONDS`, shared among the targets.
Whatever goes in, `action` ends with a result, a UserError or a RunFailure. Every other exception is a find,
and so are more than `MOST_SECONDS` of work, more than `MOST_MEMORY` of memory, and a message that nobody
could read. A find is mended, and its input becomes an `example` of the target's.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from actors.errors import RunFailure, UserError

MOST_SECONDS = 10
"""Of the processor's time that one input may take."""
MOST_MEMORY = 1 << 30
"""Bytes that one input may take beyond what the process had before."""
ROOM = 6 << 30
"""Address space that a process may ask for while an input works: the machine survives a bomb."""
STUCK_SECONDS = 120
"""By the clock; a process that waits for so long, or holds the interpreter, is ended with its stacks."""
LONGEST_MESSAGE = 20_000
"""Characters of all that is said about one input."""
LONGEST_SHOWN = 4_000
"""Characters of an input that a find shows."""
BATCH = 200
"""Inputs for which Hypothesis is started once when it works by time."""


class TooLong(BaseException):
    """One input took more than `MOST_SECONDS`. No Exception, so that no code under test catches it."""


class Given:
    """One input, shown shortly: Hypothesis itself prints no value of a thousand levels."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        try:
            shown = repr(self.value)
        except RecursionError:
            return f"a {type(self.value).__name__} of too many levels to show"
        return (
            shown if len(shown) < LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}... ({len(shown):,} characters)"
        )


@dataclass
class Feed:
    """One target's inputs: a fixed number of the same ones, or new ones until its time is over."""

    seconds: float | None
    """None: as many as the target says, derandomised."""
    executions: int = 0
    refusals: int = 0
    """Inputs that ended in a message."""

    def __call__(
        self,
        action: Callable[[Any], object],
        strategy: st.SearchStrategy[Any],
        *,
        inputs: int = 200,
        examples: Sequence[Any] = (),
    ) -> None:
        """Feed `examples` and what `strategy` draws to `action`; `inputs`: how many in `make test`.

        Raises:
            AssertionError, or what `action` raised: a find, with the smallest input that shows it.
        """

        def one(value: Any) -> None:
            self.executions += 1
            self.refusals += refused(lambda: action(value))

        for value in examples:
            one(value)
        if self.seconds is None:
            _hypothesis(one, strategy, inputs, None)
            return
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            # A target that takes few inputs in `make test` has slow ones: its batch ends in time too.
            _hypothesis(one, strategy, min(BATCH, 5 * inputs), int.from_bytes(os.urandom(4), "big"))


@st.composite
def _given(draw: st.DrawFn, strategy: st.SearchStrategy[Any]) -> Given:
    return Given(draw(strategy))


def _hypothesis(
    one: Callable[[Any], None], strategy: st.SearchStrategy[Any], inputs: int, seed: int | None
) -> None:
    """`inputs` drawn ones to `one`; the same ones in every process where there is no `seed`."""

    def drawn(given: Given) -> None:
        one(given.value)

    test = hypothesis.given(_given(strategy))(drawn)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    hypothesis.settings(
        max_examples=inputs,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )(test)()


def refused(action: Callable[[], object]) -> bool:
    """True where `action` ended in a message, False for a result.

    Raises:
        AssertionError: it took too long or too much memory, or its message is none.
        Exception: what `action` raised, if that is neither a UserError nor a RunFailure.
    """
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the highest, starts anew
    try:
        with bounded():
            action()
        said = None
    except UserError as error:
        said = error.problems
        assert said, "a UserError without a problem"
        assert all(problem.strip() for problem in said), f"an empty problem in {said}"
    except RunFailure as error:
        said = [str(error)]
    except TooLong:
        raise AssertionError(f"took more than {MOST_SECONDS} s") from None
    grown = _memory("VmHWM") - before
    assert grown < MOST_MEMORY, f"took {grown / 2**20:,.0f} MiB of memory"
    if said is not None:
        text = "\n".join(said)
        assert len(text) < LONGEST_MESSAGE, f"a message of {len(text):,} characters: {text[:400]}"
    return said is not None


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def bounded() -> Iterator[None]:
    """Bound what a block takes: processor time (TooLong), address space (MemoryError), and waiting.

    Works in the main thread only, where signals arrive.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = _memory("VmSize") + ROOM
    hard = limits[1]
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
    resource.setrlimit(
        resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)

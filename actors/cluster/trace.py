"""Traces of calls, for the report's timeline: what a process was asked for and when, a JSON line a call.

Lines are {"method", "phase", "start", "end", "peak_rss"} with "step" and "role" where the call names them,
and "error" where it raised. `peak_rss` is the most memory, in bytes, that the process has had so far. `start`
is in seconds since the epoch by this machine's clock, `end` is later by as much as a clock that nobody sets
has counted. A call that never ended (the process was killed) leaves no line; where the variable
RAYLIGN_TRACE_BEGINNINGS is set, a file beside (`NAME.begun`) has a line {"method", "phase", "start"} of every
call from its beginning on, so that a test can hit a process inside a call.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

KIB = 1024
"""Linux' unit of `ru_maxrss`, in bytes."""
DIGITS = 5
"""Of a second: a call between processes takes about 0.001 s."""
BEGINNINGS = "RAYLIGN_TRACE_BEGINNINGS"
"""Variable of the environment: set, calls are noted when they begin, too."""


class CallTrace:
    """Appends to `path`. Never raises: a full disk must not end a run for the sake of its timeline."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = path.with_suffix(".begun") if os.environ.get(BEGINNINGS) else None

    @contextlib.contextmanager
    def call(self, method: str, phase: str, names: Mapping[str, int | str] | None = None) -> Iterator[None]:
        """Note what runs inside; `names`: further entries of the line."""
        began, since = time.time(), time.monotonic()
        line: dict[str, int | float | str] = {"method": method, "phase": phase, "start": round(began, DIGITS)}
        if self._begun is not None:
            self._append(self._begun, line)
        try:
            yield
        except BaseException as error:
            line["error"] = type(error).__name__
            raise
        finally:
            line["end"] = round(began + time.monotonic() - since, DIGITS)
            line["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
            self._append(self.path, line | dict(names or {}))

    @staticmethod
    def _append(path: Path, line: Mapping[str, int | float | str]) -> None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def named(
    function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, int | str]:
    """The step and the role that a call is about, where its arguments say so."""
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # The call itself will say what is wrong with its arguments.
        return {}
    found: dict[str, int | str] = {}
    step, role = given.get("step"), given.get("role")
    if isinstance(step, int):
        found["step"] = step
    if isinstance(role, str):
        found["role"] = role
    return found

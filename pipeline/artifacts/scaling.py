"""Requests to change the number of engines of a run that goes on, and their answers: files in its directory.

`raylign scale` writes a request, as a stop is one; the run takes it up between two steps of an online stage,
and writes its answer when that is done. One request at a time: a later one takes the place of one that was
not taken up.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts.manifest import write_json

REQUEST, ANSWER = "SCALE", "SCALE.answer"


@dataclass(frozen=True)
class ScaleRequest:
    """A number of engines that somebody wants."""

    key: str
    """Tells it from others."""
    engines: int


@dataclass(frozen=True)
class ScaleAnswer:
    """Outcome of a request."""

    key: str
    said: str
    done: bool
    """False: it was refused, or failed; nothing has changed."""


def ask_to_scale(directory: Path, engines: int) -> str:
    """Write a request; its key. Raises: OSError."""
    key = secrets.token_hex(8)
    write_json(directory / REQUEST, {"key": key, "engines": engines})
    return key


def take_request(directory: Path) -> ScaleRequest | None:
    """The request that is there, which is gone then; None without one, or where it is none of `raylign`'s."""
    path = directory / REQUEST
    if not path.is_file():
        return None
    found = _read(path)
    path.unlink(missing_ok=True)
    match found:
        case {"key": str(key), "engines": int(engines)}:
            return ScaleRequest(key, engines)
    return None


def answer_request(directory: Path, answer: ScaleAnswer) -> None:
    """Write what came of a request. Raises: OSError."""
    write_json(directory / ANSWER, vars(answer))


def answer_of(directory: Path, key: str) -> ScaleAnswer | None:
    """The answer to a request, once it is there."""
    match _read(directory / ANSWER):
        case {"key": str(of), "said": str(said), "done": bool(done)} if of == key:
            return ScaleAnswer(of, said, done)
    return None


def _read(path: Path) -> object:
    """JSON of a file; None where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def clear_requests(directory: Path) -> None:
    """Forget what was asked of an earlier run in this directory, and answered."""
    for name in (REQUEST, ANSWER):
        (directory / name).unlink(missing_ok=True)


def wanted_engines(settings: Sequence[str]) -> tuple[int | None, list[str]]:
    """Number of engines in `rollout=N` of a command line, and all that is wrong with what was given; pure."""
    number: int | None = None
    problems = []
    for setting in settings:
        role, equals, value = setting.partition("=")
        if not equals:
            problems.append(f"{setting}: write rollout=N, the number of engines")
        elif role != "rollout":
            problems.append(
                f"{setting}: only the number of rollout engines can change while a run goes on (rollout=N): "
                "all else is how other processes were started; set it in the config, stop the run, and go on"
            )
        elif not value.isdecimal() or int(value) < 1:
            problems.append(f"{setting}: must be a whole number of engines, 1 or more")
        else:
            number = int(value)
    return number, problems

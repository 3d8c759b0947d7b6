"""Values that a reward function returned: finite numbers, None, or a problem with its sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

SHOWN = 400
"""Characters of a value, a prompt or a completion in a message."""


@dataclass(frozen=True)
class RewardCall:
    """Result of a call of a reward function: values, or a problem and its samples."""

    values: list[float | None]
    """One a sample; where `problem` is set, those of `bad` hold nothing of use."""
    problem: str = ""
    bad: tuple[int, ...] = ()
    """Samples without a value that can be used; the first is the one to show."""


def examined(values: Any, n: int) -> RewardCall:
    """Numbers, None or bool as floats; anything else is a problem with its sample."""
    ordered = not isinstance(values, (str, bytes, Mapping, Set))  # Of these, entries are no answers in order.
    try:
        found = list(values) if ordered else None
    except TypeError:
        found = None
    if found is None:
        return RewardCall([None] * n, f"it returned {type(values).__name__}, not a list", tuple(range(n)))
    if len(found) != n:
        return RewardCall([None] * n, f"it returned {len(found)} values for {n} samples", tuple(range(n)))
    read = [None if value is None else _number(value) for value in found]
    bad = tuple(i for i, value in enumerate(read) if value is not None and not math.isfinite(value))
    problem = ""
    if bad:
        what = f"{shown_value(found[bad[0]])} for sample {bad[0]} of {n}"
        problem = f"it returned {what}, and a reward or score is a finite number, or None for `not for me`"
    return RewardCall(read, problem, bad)


def _number(value: Any) -> float:
    """NaN for what is no number; numpy's and torch's scalars are numbers, a text is none."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # Too large an integer, an array, whatever a class of the user's own raises.
        return math.nan


def shown_value(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        return cut(repr(value))
    except Exception:  # A class of the user's own; an integer of more digits than Python prints.
        return f"a value of type {type(value).__name__}"


def cut(text: str, most: int = SHOWN) -> str:
    """A text for a message: its beginning where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"

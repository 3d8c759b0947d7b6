"""Counts of what a chat template does: each function raises `TemplateLimit` where a bound is passed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from threading import local
from types import GeneratorType
from typing import Any

SECONDS = 10.0
"""Processor time that one conversation may take; a long one takes milliseconds."""
SIZE = 2**25
"""Characters that a template may hold in one value, or write."""
PART = 32
"""Characters that each value in a list or mapping counts as, besides its own."""
DIGITS = 100_000
"""Bits of an integer."""
WIDTH = 1_000_000
"""Columns that a text is padded to, or parts that a list is cut into."""

now = local()
"""Of this thread: `until`, its processor time at which a template is ended; `weights` of lists that were
looked at; `ticks`."""
_WIDTHS = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "to_bytes")
)
_LARGE_FIELD = re.compile(r"%[^a-zA-Z%]*(\*|\d{7})|\{[^{}]*:[^{}]*(\{|\d{7})")
"""A field of a format that is a million columns wide, or as wide as one of its values."""
_MANY = 1000
"""Rounds of a loop before which the time is looked at in any case."""


class TemplateLimit(Exception):
    """Raised in a template that goes beyond a bound; its text says which."""


def tick(rounds: int = 0) -> None:
    """Look at the time now and then; always before many `rounds`."""
    now.ticks = getattr(now, "ticks", 0) + 1
    if rounds <= _MANY and now.ticks & 63:
        return
    until = getattr(now, "until", None)
    if until is not None and time.thread_time() > until:
        raise TemplateLimit(f"one conversation took it more than {SECONDS:g} s")


def _refuse(size: int) -> None:
    if size > SIZE:
        raise TemplateLimit(f"it makes a value of more than {SIZE:,} characters, or as large a list")


def within(value: Any) -> Any:
    """The value, within the bounds; of a generator, what it yields will be."""
    kind = type(value)
    if kind is str:
        _refuse(len(value))
    elif kind is int:
        if value.bit_length() > DIGITS:
            raise TemplateLimit(f"it makes a number of more than {DIGITS:,} bits")
    elif isinstance(value, list | tuple | dict):
        _refuse(_weight(value))
    elif kind is GeneratorType:
        return _flow(value)
    return value


def _flow(values: Iterable[Any]) -> Iterator[Any]:
    total = 0
    for value in values:
        tick()
        total += _weight(value)
        _refuse(total)
        yield value


def _weight(value: Any) -> int:
    """Characters and values in it, as often as it has them: what is written of it is about as long. A list in
    a list twice doubles; each is looked at once, since the sandbox lets none be changed."""
    if isinstance(value, str | bytes):
        return len(value) + PART
    if not isinstance(value, list | tuple | dict):
        return PART
    known: dict[int, tuple[Any, int]] | None = getattr(now, "weights", None)
    if known is None:
        return len(value) * PART
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        try:
            known[id(value)] = value, PART + sum(map(_weight, parts))
        except RecursionError:
            raise TemplateLimit("it puts lists in one another without end") from None
    return known[id(value)][1]


def before_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse an operator whose result would be too large to be made and looked at."""
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            within(1 << min(bits, DIGITS + 1))
        else:
            many, one = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(many, int):
                _refuse(many * _weight(one))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        within(1 << min(left.bit_length() * max(right, 0), DIGITS + 1))
    elif operator == "+" and not isinstance(left, int | float):
        _refuse(_weight(left) + _weight(right))
    elif operator == "%" and isinstance(left, str):
        before_format(left)


def before_format(text: str) -> None:
    """Refuse a format with a field that is too wide."""
    if _LARGE_FIELD.search(text):
        raise TemplateLimit("it writes a value in a field of a million columns, or as wide as another value")


def before_call(name: str, subject: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Refuse a filter, or a method of a text or number, whose result would be too large; `subject` is what it
    is applied to."""
    given = [*args, *named.values()]
    largest = max((abs(value) for value in given if isinstance(value, int)), default=0)
    if name in _WIDTHS:
        lines = 1 + subject.count("\n") + subject.count("\t") if isinstance(subject, str) else 1
        if largest > WIDTH or largest * lines > SIZE:
            raise TemplateLimit(f"it makes something {largest:,} wide")
    elif name == "tojson":
        if largest > 100:
            raise TemplateLimit(f"it indents by {largest:,}")
    elif name == "join":  # A text's method and the filter: each has the other's two sides.
        parts = [value for value in (subject, *given[:1]) if hasattr(value, "__len__")]
        longest = max(map(len, parts), default=0)
        _refuse(sum(map(_weight, parts)) + longest * min(map(len, parts)) if len(parts) > 1 else longest)
    elif name == "sum" and any(isinstance(value, list | tuple) for value in given):
        _refuse(_weight(subject) * len(subject))  # Each step makes a longer list.
    elif name == "strftime":
        before_format(str(given[:1]))
    elif not isinstance(subject, str):
        return
    elif name == "replace" and len(given) > 1:
        old, new = named.get("old", given[0]), named.get("new", given[-1] if "new" in named else given[1])
        _refuse(len(subject) + subject.count(str(old)) * len(str(new)))
    elif name in ("wordwrap", "urlize", "translate"):
        _refuse(len(subject) * max(map(_weight, given), default=1))
    elif name in ("format", "format_map"):
        before_format(subject)


def sized(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with lists in place of generators, where their length decides on the result's."""
    if name not in ("join", "sum"):
        return args
    return tuple(list(arg) if type(arg) is GeneratorType else arg for arg in args)


class Filters(dict[str, Callable[..., Any]]):
    """Filters of jinja's and transformers', each within the bounds."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # Of some the first is their surroundings.

        @wraps(function)
        def counted_filter(*args: Any, **named: Any) -> Any:
            tick()
            args = sized(name, args)
            before_call(name, args[first] if len(args) > first else None, args[first + 1 :], named)
            return within(function(*args, **named))

        super().__setitem__(name, counted_filter)


def entered(context: Any, values: Any) -> Any:
    """The values that a loop goes over; the time is looked at before it begins."""
    tick(len(values) if hasattr(values, "__len__") else 0)
    return values


def built(context: Any, value: Any) -> Any:
    """A list or mapping that a template has written out."""
    return within(value)


def joined(context: Any, values: list[Any]) -> str:
    """The text of values that a template puts one after the other."""
    _refuse(sum(map(_weight, values)))
    return "".join(map(str, values))


def written(pieces: Iterable[str]) -> str:
    """All that a template or a macro of it writes."""
    return "".join(counted(pieces))


def counted(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a template's output, up to the bound."""
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > SIZE:
            raise TemplateLimit(f"it writes more than {SIZE:,} characters")
        yield piece

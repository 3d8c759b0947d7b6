"""Calls a user's function: with its own copy of the arguments, coroutines and generators settled, and again
for the sample that makes it raise.

Runs in the function's process (`child.py`), so it loads nothing but Python's own modules.
"""

from __future__ import annotations

import inspect
import pickle
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.rewards.values import RewardCall, cut, examined

PLAIN = frozenset((str, int, float, bool, bytes, type(None)))
"""Types that no function can change, so that samples may share them."""

Packed = dict[str, tuple[bool, list[Any]]]
"""By argument: True and each sample's value pickled by itself, or False and the values, all of them plain."""


def packed(given: Mapping[str, Sequence[Any]]) -> Packed:
    """Arguments such that each sample's values can be read anew, sharing nothing with another sample's."""
    found: Packed = {}
    for name, values in given.items():
        if all(type(value) in PLAIN for value in values):
            found[name] = False, list(values)
        else:
            found[name] = True, [pickle.dumps(value, pickle.HIGHEST_PROTOCOL) for value in values]
    return found


def unpacked(given: Packed, start: int, stop: int) -> dict[str, list[Any]]:
    """A copy of the arguments of samples `start` to `stop` - 1; token ids in arrays come as lists."""
    return {
        name: [_read(value) for value in values[start:stop]] if pickled else values[start:stop]
        for name, (pickled, values) in given.items()
    }


def _read(value: bytes) -> Any:
    found = pickle.loads(value)
    return found.tolist() if type(found) is array else found


def taken(function: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """Names of a function's arguments, those of them that it can't be called without, and True where it takes
    any others (`**kwargs`, or nothing is known of it)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # Of some functions in C nothing is known.
        return [], [], True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in parameters if p.kind in named]
    needed = [p.name for p in parameters if p.kind in named and p.default is p.empty]
    return names, needed, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def answer(
    function: Callable[..., Any],
    given: Packed,
    n: int,
    seconds: float,
    raised: Callable[[str], None] = lambda text: None,
) -> RewardCall:
    """One call with all `n` samples: its values, or the problem with its sample.

    Args:
        seconds: after which the sample that made it raise is no longer looked for.
        raised: told of an exception before that sample is looked for.
    """
    deadline = time.monotonic() + seconds
    try:
        return examined(_call(function, given, 0, n), n)
    except BaseException as error:  # SystemExit and the like would end the process without a word
        text = _described(error)
        raised(text)
    index, text = _culprit(function, given, n, text, deadline)
    return RewardCall([None] * n, text, (index, *(i for i in range(n) if i != index)))


def _culprit(
    function: Callable[..., Any], given: Packed, n: int, text: str, deadline: float
) -> tuple[int, str]:
    """A sample that makes the function raise by itself, and what it raises; 0 and `text` if none is found.

    The first sample is tried alone, so that a judge that is out of reach is asked once more and no oftener;
    then halves, the first one first: one call for each doubling of the samples.
    """

    def raised(start: int, stop: int) -> str | None:
        try:
            _call(function, given, start, stop)
        except BaseException as found:
            return _described(found)
        return None

    low, high = 0, n
    if (alone := raised(0, 1)) is not None:
        return 0, alone
    while high - low > 1:
        if time.monotonic() > deadline:
            return 0, text
        middle = (low + high) // 2
        low, high = (low, middle) if raised(low, middle) is not None else (middle, high)
    alone = raised(low, high) if low else None
    return (0, text) if alone is None else (low, alone)


def _call(function: Callable[..., Any], given: Packed, start: int, stop: int) -> Any:
    values = function(**unpacked(given, start, stop))
    if inspect.isawaitable(values):
        values = _event_loop().run_until_complete(_awaited(values))
    # A generator does its work when it is read: here, where deadline and message hold.
    return list(values) if isinstance(values, Iterator) else values


_loop: Any = None


def _event_loop() -> Any:
    """The one event loop of this process: clients and locks of one call are bound to it in the next. It is
    the loop that a module got while it was imported, if it asked for one."""
    global _loop
    import asyncio

    if _loop is None or _loop.is_closed():
        try:
            _loop = asyncio.get_event_loop_policy().get_event_loop()
        except RuntimeError:  # `asyncio.run` has taken it away.
            _loop = asyncio.new_event_loop()
    asyncio.set_event_loop(_loop)
    return _loop


async def _awaited(values: Any) -> Any:
    return await values


def _described(error: BaseException) -> str:
    try:
        text = cut(str(error), 2000)
    except Exception:  # a class of the user's own
        text = "its text can't be read"
    return f"it raised {type(error).__name__}: {text}"

"""A user's functions by name, each served by the process of its module (`processes.py`).

Processes are kept here from the first use of their module to the end of the run, so that what looks at a
function before the run, its stages and the evaluation share one.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from actors.errors import UserError
from pipeline.rewards.processes import FunctionProcess, LoadedCode, UserProcess
from pipeline.rewards.values import RewardCall

_processes: dict[Hashable, UserProcess] = {}
_pickled: dict[int, UserFunction] = {}
"""Functions that came as objects, by their id; each is taken out when its object is gone."""
_runs = 0
"""Runs and checks of runs that use the processes."""
_lock = threading.Lock()


class UserFunction:
    """One function of the user's, whose code is never loaded in this process."""

    def __init__(self, code: LoadedCode, name: str) -> None:
        self.code, self.name = code, name

    @property
    def found(self) -> tuple[Any, ...]:
        """As `FunctionProcess.find` says."""
        return process_of(self.code).find(self.name)

    def missing(self, given: Iterable[str]) -> list[str]:
        """Arguments without a default that it asks for and that are not among those given."""
        kind, *rest = self.found
        return [name for name in rest[1] if name not in set(given)] if kind == "found" else []

    def call(self, given: Mapping[str, Sequence[Any]], n: int, timeout_s: float) -> RewardCall:
        """Call it once with all samples' values of each argument; it has `timeout_s` seconds."""
        return process_of(self.code).call(self.name, given, n, timeout_s)

    def release(self) -> None:
        """End its process, so that what calls have left behind there reaches no later one."""
        with _lock:
            process = _processes.pop(self.code, None)
        if process is not None:
            process.close()


def user_function(source: str) -> UserFunction:
    """The function that `module:function` names; it is not looked at yet.

    A module that only this process has, of a script or a notebook, can't be imported in another: its function
    goes there by itself.
    """
    module, _, name = source.partition(":")
    there = sys.modules.get(module)
    if there is not None and (module == "__main__" or getattr(there, "__spec__", None) is None):
        function = getattr(there, name, None)
        if callable(function):
            return pickled_function(function)
    if os.getcwd() not in sys.path:  # The installed command, unlike `python -m`, does not look there.
        sys.path.insert(0, os.getcwd())
    return UserFunction(LoadedCode(module), name)


def pickled_function(function: Callable[..., Any]) -> UserFunction:
    """A function that is there as an object, served by a process that lasts as long as the object.

    It is pickled with what it refers to, so its module isn't imported in the process.

    Raises:
        UserError: it refers to something that can't be pickled.
    """
    with _lock:
        if id(function) not in _pickled:
            name = getattr(function, "__name__", type(function).__name__)
            _pickled[id(function)] = UserFunction(LoadedCode("", _by_value(function)), name)
            weakref.finalize(function, _forget, id(function))
        return _pickled[id(function)]


def _by_value(function: Callable[..., Any]) -> bytes:
    import functools

    import cloudpickle

    inner = function.func if isinstance(function, functools.partial) else function
    module = sys.modules.get(getattr(inner, "__module__", None) or "")
    apart = module is not None and module.__name__ != "__main__"  # else by value anyhow
    if apart:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cast(bytes, cloudpickle.dumps(function))
    except Exception as error:  # what a function refers to may refuse in any way
        raise UserError(
            f"{getattr(function, '__name__', function)!s} can't be carried into a process of its own "
            f"({type(error).__name__}: {error}): put it into a module, which is imported there"
        ) from None
    finally:
        if apart:
            cloudpickle.unregister_pickle_by_value(module)


def _forget(key: int) -> None:
    found = _pickled.pop(key, None)
    process = _processes.pop(found.code, None) if found is not None else None
    if process is not None:
        process.close()


def process_of(code: LoadedCode) -> FunctionProcess:
    """The process that serves this code, started where there is none."""
    return kept(code, lambda: FunctionProcess(code))


P = TypeVar("P", bound=UserProcess)


def kept(key: Hashable, make: Callable[[], P]) -> P:
    """The process that is kept by this name to the end of the run, made where there is none."""
    with _lock:
        if key not in _processes:
            _processes[key] = make()
        return cast(P, _processes[key])


def start_functions(sources: Iterable[str]) -> None:
    """Start the processes of these functions, which import their modules while this process goes on."""
    for source in sources:
        process_of(user_function(source).code)


@contextmanager
def functions_closed() -> Iterator[None]:
    """End all processes of functions afterwards, unless another run of this process still has them."""
    global _runs
    with _lock:
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
            processes = [] if _runs else list(_processes.values())
            if not _runs:
                _processes.clear()
        for process in processes:  # All at once, then each is waited for.
            process.hang_up()
        for process in processes:
            process.close()

"""Calls from an engine into vLLM's worker processes, in values that survive every way there.

A worker may live in the engine's own process, in a process of its own, or behind a core in a process of its
own (vLLM's default on GPUs). The last way carries numbers, texts, bytes, lists and dicts and nothing else
(msgpack): a dataclass arrives as a dict, an array as a list, an exception as its text. So methods of the
worker's extension take and return these only, and an error that means something is an answer too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.errors import InvariantViolation, LinkFailure, RunFailure, UserError
from actors.rollout.vllm.workarounds.registry import LEANT_ON

if TYPE_CHECKING:
    from vllm import LLM

_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (UserError, RunFailure, LinkFailure, InvariantViolation)
}


def answers(method: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Decorator of a worker's method that `ask` calls: its value or its error, as plain values."""

    @wraps(method)
    def answering(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return {"value": method(*args, **kwargs)}
        except (UserError, RunFailure) as error:
            made_of = [error.problems] if isinstance(error, UserError) else list(error.args)
            return {"error": type(error).__name__, "args": made_of}

    return answering


def ask(llm: LLM, method: str, *args: Any) -> list[Any]:
    """Values of a method of the extension, one a worker, by rank.

    Raises:
        UserError, RunFailure: as the first worker that raised one.
    """
    found = llm.llm_engine.collective_rpc(method, args=args)
    for one in found:
        if "error" in one:
            raise _ERRORS[one["error"]](*one["args"])
    return [one["value"] for one in found]


@contextmanager
def standing_still(llm: LLM) -> Iterator[None]:
    """The engine computes nothing meanwhile, whatever it has to do; afterwards it goes on.

    A core in this process moves only when it is told to. One in a process of its own moves by itself, also
    between two calls, and half of its weights could be loaded then. After an error it stays as it is.
    """
    core = llm.llm_engine.engine_core
    if not hasattr(core, "call_utility"):
        yield
        return
    LEANT_ON["pause_of_core"].check()
    core.call_utility("pause_scheduler", "keep", False)
    yield
    core.call_utility("resume_scheduler")


def packed(array: np.ndarray) -> list[Any]:
    """An array as plain values."""
    return [array.dtype.str, list(array.shape), array.tobytes()]


def unpacked(values: list[Any]) -> np.ndarray:
    """The inverse of `packed`; it can't be written to."""
    dtype, shape, data = values
    return np.frombuffer(data, dtype=dtype).reshape(shape)

"""Calls reward functions, with a deadline. Sums of rewards are in `actors/algorithms/reward_shaping.py`.

- A reward function is called as TRL 1.16 calls it: f(prompts=, completions=, completion_ids=, **columns),
  and returns one float or None per sample. None means "not for me": it counts in no sum and no mean.
- Every fault of a function is seen: an exception, a wrong number of values, NaN, or no answer in time ends
  in one message with the sample, or in the default that the configuration names.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from actors.errors import RunFailure, UserError
from actors.spec import Spec
from pipeline.rewards.values import RewardCall, examined, shown_value

EXACT_MATCH = "exact_match"
FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")

RewardFunction = Callable[..., Any]
ARGUMENTS = ("prompts", "completions", "completion_ids")
"""Arguments that every reward function gets, in addition to the columns of the data."""


class RewardSpec(Spec):
    """One source of reward. A bare string in the configuration is a `source`."""

    source: str = Field(min_length=1)
    """`exact_match`, `module:function`, an earlier reward stage, or the directory of a reward model."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this reward in the sum. 0: it is only logged, and a sample that nothing else scores has no
    reward."""
    timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds that a function may take for one call with all samples of a step."""
    on_error: Literal["stop"] | float = "stop"
    """Effect of a function's failure: `stop` ends the run; a number is the reward of the samples
    concerned."""

    @model_validator(mode="before")
    @classmethod
    def _bare_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _finite_default(self) -> RewardSpec:
        if self.on_error != "stop" and not math.isfinite(self.on_error):
            raise ValueError("on_error is `stop` or a finite number")
        return self

    @property
    def kind(self) -> Literal["exact_match", "function", "model"]:
        """Kind of thing that `source` names; a `model` is a reward stage or a directory."""
        if self.source == EXACT_MATCH:
            return "exact_match"
        return "function" if FUNCTION.match(self.source) else "model"

    @property
    def name(self) -> str:
        """Name in metrics: the function's, the stage's, or of a directory `.../NAME/adapter` NAME."""
        if self.kind == "function":
            return self.source.partition(":")[2]
        parts = [part for part in PurePosixPath(self.source).parts if part not in ("adapter", "/", "..")]
        return parts[-1] if parts else self.source


def reward_names(specs: Sequence[RewardSpec]) -> list[str]:
    """A name for each source; repeated ones are numbered (`length`, `length-2`)."""
    seen: dict[str, int] = {}
    names = []
    for spec in specs:
        seen[spec.name] = seen.get(spec.name, 0) + 1
        names.append(spec.name if seen[spec.name] == 1 else f"{spec.name}-{seen[spec.name]}")
    return names


def find_function(source: str) -> RewardFunction:
    """The reward function that `module:function` names.

    Raises:
        UserError: nothing of that name can be imported, or it can't be called.
    """
    other = "a reward stage, or a reward model's directory"
    return import_function(
        source, "rewards", f"exact_match, module:function with the module on the path, {other}"
    )


def import_function(source: str, key: str, choices: str) -> Callable[..., Any]:
    """The function that `module:function` names; `key` and `choices` say in errors where it was named and
    what could be.

    Raises:
        UserError: nothing of that name can be imported, or it can't be called.
    """
    module, _, name = source.partition(":")
    if os.getcwd() not in sys.path:  # The installed command, unlike `python -m`, does not look there.
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module can fail in any way while it is imported
        raise UserError(
            f"{key}: {source!r} cannot be imported ({type(error).__name__}: {error}); {_own_name(module)}"
            f"write {choices}"
        ) from None
    if not callable(found):
        raise UserError(f"{key}: {source!r} is not a function but of type {type(found).__name__}")
    return found


def _own_name(module: str) -> str:
    """What to do where a user's module lies in a package that is named as one of Raylign's."""
    package = module.partition(".")[0]
    if package not in ("actors", "pipeline"):
        return ""
    place = next((f" ({p})" for p in (Path(package), Path(f"{package}.py")) if p.exists()), "")
    return (
        f"`{package}` is a package of Raylign, so none of yours can have that name{place}: rename yours, or "
    )


@dataclass(frozen=True)
class Samples:
    """Samples for a reward function; every list has one entry per sample."""

    prompts: Sequence[Any]
    """Strings, or message lists where the data is conversational."""
    completions: Sequence[Any]
    """Strings, or `[{"role": "assistant", "content": ...}]` where prompts are conversational."""
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Further columns of the data, repeated for every sample of a prompt."""

    def __len__(self) -> int:
        return len(self.completions)

    def part(self, start: int, stop: int) -> Samples:
        """Samples `start` to `stop` - 1 by themselves."""
        cut = slice(start, stop)
        columns = {name: values[cut] for name, values in self.columns.items()}
        return Samples(self.prompts[cut], self.completions[cut], self.completion_ids[cut], columns)

    def shown(self, index: int) -> str:
        """One sample for a message, long texts cut."""
        parts = {"prompt": self.prompts[index], "completion": self.completions[index]}
        parts |= {name: values[index] for name, values in self.columns.items()}
        return "\n".join(f"    {name}: {shown_value(value)}" for name, value in parts.items())


def call_reward_function(function: RewardFunction, samples: Samples, timeout_s: float) -> RewardCall:
    """Call a function once with all samples, in a thread of its own, and check its values.

    A function that does not answer in time is left running: Python can't end a thread.
    """
    n = len(samples)
    outcome: dict[str, Any] = {}
    thread = threading.Thread(target=_answer, args=(function, samples, timeout_s, outcome), daemon=True)
    thread.start()
    thread.join(timeout_s)
    if "error" in outcome:
        index, error = outcome["error"]
        text = f"it raised {type(error).__name__}: {error}"
        return RewardCall([None] * n, text, (index, *(i for i in range(n) if i != index)))
    if "values" not in outcome:
        text = f"no answer within {timeout_s:g} s for {n} samples; the first of them is shown"
        return RewardCall([None] * n, text, tuple(range(n)))
    return examined(outcome["values"], n)


def _answer(function: RewardFunction, samples: Samples, timeout_s: float, outcome: dict[str, Any]) -> None:
    """Runs in the thread: the function's values, or its exception with the sample that provokes it."""
    deadline = time.monotonic() + timeout_s
    try:
        outcome["values"] = _call(function, samples)
    except BaseException as error:  # SystemExit and the like would end the thread without a word
        outcome["error"] = (0, error)
        outcome["error"] = _culprit(function, samples, error, deadline)


def _culprit(
    function: RewardFunction, samples: Samples, error: BaseException, deadline: float
) -> tuple[int, BaseException]:
    """A sample that makes the function raise by itself, and what it raises; 0 and `error` if none is found.

    The first sample is tried alone, so that a judge that is out of reach is asked once more and no oftener;
    then halves, the first one first: one call for each doubling of the samples.
    """

    def raised(start: int, stop: int) -> BaseException | None:
        try:
            _call(function, samples.part(start, stop))
        except BaseException as found:
            return found
        return None

    low, high = 0, len(samples)
    if (alone := raised(0, 1)) is not None:
        return 0, alone
    while high - low > 1:
        if time.monotonic() > deadline:
            return 0, error
        middle = (low + high) // 2
        low, high = (low, middle) if raised(low, middle) is not None else (middle, high)
    alone = raised(low, high) if low else None
    return (0, error) if alone is None else (low, alone)


def _call(function: RewardFunction, samples: Samples) -> Any:
    """TRL's call; a function without **kwargs gets only what it names."""
    given = {
        **samples.columns,
        "prompts": samples.prompts,
        "completions": samples.completions,
        "completion_ids": samples.completion_ids,
    }
    values = function(**named_by(function, given))
    if inspect.isawaitable(values):
        import asyncio

        values = asyncio.run(_awaited(values))
    # A generator does its work when it is read: here, where deadline and message hold.
    return list(values) if isinstance(values, Iterator) else values


def named_by(function: RewardFunction, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments that a function takes: all with **kwargs, else those that it names."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(given)
    return {name: value for name, value in given.items() if name in parameters}


def missing_arguments(function: RewardFunction, given: Iterable[str]) -> list[str]:
    """Arguments without a default that a function asks for and that are not among those given."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    there = set(given)
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in named and parameter.default is parameter.empty and name not in there
    ]


async def _awaited(values: Any) -> Any:
    return await values


def function_rewards(spec: RewardSpec, function: RewardFunction, samples: Samples) -> tuple[np.ndarray, str]:
    """Rewards of one function, float64 (N,), NaN where it passes a sample over; and a text about replaced
    ones.

    Returns:
        The rewards, and an empty text, or why `on_error` stands in for some of them.

    Raises:
        RunFailure: the function failed and `on_error` is `stop`; names function, reason and sample.
    """
    called = call_reward_function(function, samples, spec.timeout_s)
    values = np.array([math.nan if v is None else v for v in called.values], dtype=np.float64)
    if not called.problem:
        return values, ""
    if spec.on_error == "stop":
        raise RunFailure(
            f"reward '{spec.name}'",
            "rewards",
            f"{called.problem}\n{samples.shown(called.bad[0])}",
            f"mend {spec.source}, or set `on_error` of this reward to the number that such samples get",
        )
    values[list(called.bad)] = spec.on_error
    return values, f"{called.problem}; {len(called.bad)} of {len(samples)} samples get {spec.on_error:g}"

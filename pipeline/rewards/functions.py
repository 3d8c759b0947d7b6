"""Calls reward functions, with a deadline. Sums of rewards are in `actors/algorithms/reward_shaping.py`.

- A reward function is called as TRL 1.16 calls it: f(prompts=, completions=, completion_ids=, **columns),
  and returns one float or None per sample. None means "not for me": it counts in no sum and no mean.
- It runs in a process of its own, which is killed when its time is over (`processes.py`).
- Every fault of a function is seen: an exception, a wrong number of values, NaN, or no answer in time ends
  in one message with the sample, or in the default that the configuration names.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.errors import RunFailure, UserError
from pipeline.rewards.exact_match import exact_match
from pipeline.rewards.spec import RewardSettings
from pipeline.rewards.values import RewardCall, examined, shown_value

if TYPE_CHECKING:
    from pipeline.rewards.user_functions import UserFunction

RewardFunction = Callable[..., Any]
ARGUMENTS = ("prompts", "completions", "completion_ids")
"""Arguments that every reward function gets, in addition to the columns of the data."""


def find_function(source: str) -> UserFunction:
    """The reward function that `module:function` names.

    Raises:
        UserError: nothing of that name can be imported, or it can't be called.
    """
    other = "a reward stage, or a reward model's directory"
    return import_function(
        source, "rewards", f"exact_match, module:function with the module on the path, {other}"
    )


def import_function(source: str, key: str, choices: str) -> UserFunction:
    """The function that `module:function` names; `key` and `choices` say in errors where it was named and
    what could be.

    Raises:
        UserError: nothing of that name can be imported, or it can't be called.
    """
    from pipeline.rewards.user_functions import user_function

    module = source.partition(":")[0]
    function = user_function(source)
    kind, *found = function.found
    if kind == "failed":
        raise UserError(
            f"{key}: {source!r} cannot be imported ({found[0]}); {_own_name(module)}write {choices}"
        )
    if kind == "uncallable":
        raise UserError(f"{key}: {source!r} is not a function but of type {found[0]}")
    return function


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
    completion_ids: Sequence[Sequence[int] | np.ndarray]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Further columns of the data, repeated for every sample of a prompt."""

    def __len__(self) -> int:
        return len(self.completions)

    def shown(self, index: int) -> str:
        """One sample for a message, long texts cut."""
        parts = {"prompt": self.prompts[index], "completion": self.completions[index]}
        parts |= {name: values[index] for name, values in self.columns.items()}
        return "\n".join(f"    {name}: {shown_value(value)}" for name, value in parts.items())


def call_reward_function(
    function: RewardFunction | UserFunction, samples: Samples, timeout_s: float
) -> RewardCall:
    """Call a function once with all samples, in the process of its module, and check its values.

    Each call has its own copy of the arguments, in which samples share nothing. `exact_match` is Raylign's
    own and needs no process.
    """
    from pipeline.rewards.user_functions import UserFunction, pickled_function

    given = {
        **samples.columns,
        "prompts": samples.prompts,
        "completions": samples.completions,
        "completion_ids": [array("q", np.asarray(ids, np.int64).tobytes()) for ids in samples.completion_ids],
    }
    if function is exact_match:
        return examined(exact_match(**given), len(samples))
    called = function if isinstance(function, UserFunction) else pickled_function(function)
    return called.call(given, len(samples), timeout_s)


def settled(spec: RewardSettings, called: RewardCall, samples: Samples) -> tuple[np.ndarray, str]:
    """Rewards of one source, float64 (N,), NaN where it passes a sample over; and a text about replaced ones.

    Returns:
        The rewards, and an empty text, or why `on_error` stands in for some of them.

    Raises:
        RunFailure: the source failed and `on_error` is `stop`; names source, reason and sample.
    """
    values = np.array([math.nan if v is None else v for v in called.values], dtype=np.float64)
    if not called.problem:
        return values, ""
    if spec.on_error == "stop":
        raise RunFailure(
            f"reward '{spec.name}'",
            "rewards",
            f"{called.problem}\n{samples.shown(called.bad[0])}",
            f"mend {spec.says}, or set `on_error` of this reward to the number that such samples get",
        )
    values[list(called.bad)] = spec.on_error
    return values, f"{called.problem}; {len(called.bad)} of {len(samples)} samples get {spec.on_error:g}"

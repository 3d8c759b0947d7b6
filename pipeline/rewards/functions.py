"""Calls reward functions, with a deadline. Sums of rewards are in `actors/algorithms/reward_shaping.py`.

- A reward function is called as TRL 1.16 calls it: f(prompts=, completions=, completion_ids=, **columns),
  and returns one float or None per sample. None means "not for me": it counts in no sum and no mean.
- It runs in a process of its own, which is killed when its time is over (`processes.py`).
- Every fault of a function is seen: an exception, a wrong number of values, NaN, or no answer in time ends
  in one message with the sample, or in the default that the configuration names.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from actors.errors import RunFailure, UserError
from actors.spec import Spec
from pipeline.rewards.exact_match import exact_match
from pipeline.rewards.values import RewardCall, examined, shown_value

if TYPE_CHECKING:
    from pipeline.rewards.user_functions import UserFunction

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


def function_rewards(
    spec: RewardSpec, function: RewardFunction | UserFunction, samples: Samples
) -> tuple[np.ndarray, str]:
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

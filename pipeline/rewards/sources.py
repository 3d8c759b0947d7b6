"""The sources of reward of a stage behind one call: whatever scores, it begins and then has a result."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Protocol

from actors.errors import UserError
from pipeline.rewards.code_tests import code_rewards
from pipeline.rewards.exact_match import exact_match
from pipeline.rewards.functions import RewardFunction, Samples, call_reward_function, find_function
from pipeline.rewards.kept_answers import KeptAnswers
from pipeline.rewards.math_answers import MISSING, installed
from pipeline.rewards.processes import LoadedCode
from pipeline.rewards.services import ServiceSource, calling_of, service_of
from pipeline.rewards.spec import CodeReward, MathReward, RewardSettings, RewardSpec, ServiceSettings
from pipeline.rewards.user_functions import UserFunction
from pipeline.rewards.values import RewardCall


class RewardSource(Protocol):
    """A source of reward that is no model of the run's."""

    def begin(self, samples: Samples) -> Callable[[], RewardCall]:
        """Begin with the samples; the result waits for the values."""


class FunctionSource:
    """A reward function; it runs when its result is asked for, since one process serves several."""

    def __init__(self, spec: RewardSettings, function: RewardFunction | UserFunction) -> None:
        self._spec, self._function = spec, function

    def begin(self, samples: Samples) -> Callable[[], RewardCall]:
        return lambda: call_reward_function(self._function, samples, self._spec.timeout_s)


class CheckSource:
    """A check of Raylign's own that needs a process all the same: it gets the completions and one column."""

    def __init__(self, spec: RewardSettings, function: UserFunction, argument: str, column: str) -> None:
        self._spec, self._function, self._argument, self._column = spec, function, argument, column

    def begin(self, samples: Samples) -> Callable[[], RewardCall]:
        given = {"completions": samples.completions, self._argument: samples.columns[self._column]}
        return lambda: self._function.call(given, len(samples), self._spec.timeout_s)


def source_of(spec: RewardSettings, kept: KeptAnswers) -> RewardSource:
    """The source with these settings.

    Args:
        kept: answers that services gave this stage.

    Raises:
        UserError: a function can't be imported, a file can't be read, an environment variable is not set, or
            a package is missing.
    """
    if isinstance(spec, MathReward):
        if not installed():
            raise UserError(f"rewards: kind math: {MISSING}")
        code = LoadedCode("pipeline.rewards.math_answers")
        return CheckSource(spec, UserFunction(code, "math_rewards"), "right", spec.column)
    if isinstance(spec, CodeReward) and spec.sandbox is None:
        limits = {name: getattr(spec, name) for name in ("score", "seconds", "memory_mb", "processes")}
        code = LoadedCode("", pickle.dumps(functools.partial(code_rewards, **limits)))
        return CheckSource(spec, UserFunction(code, "code_rewards"), "tests", spec.column)
    if isinstance(spec, ServiceSettings):
        assert spec.url_asked is not None
        calling_of(spec, spec.url_asked)
        return ServiceSource(service_of(spec), kept, spec.url_asked)
    assert isinstance(spec, RewardSpec)
    exact = spec.kind == "exact_match"
    return FunctionSource(spec, exact_match if exact else find_function(spec.source))

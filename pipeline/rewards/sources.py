"""The sources of reward of a stage behind one call: whatever scores, it begins and then has a result."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from actors.errors import UserError
from pipeline.rewards.code_tests import code_rewards
from pipeline.rewards.exact_match import exact_match
from pipeline.rewards.functions import RewardFunction, Samples, call_reward_function, find_function
from pipeline.rewards.kept_answers import KeptAnswers
from pipeline.rewards.math_answers import MISSING, installed
from pipeline.rewards.processes import LoadedCode
from pipeline.rewards.spec import CodeReward, MathReward, RewardSettings, RewardSpec, ServiceSettings
from pipeline.rewards.user_functions import UserFunction
from pipeline.rewards.values import RewardCall

if TYPE_CHECKING:
    from pipeline.rewards.services import Judge


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


def source_of(spec: RewardSettings, kept: KeptAnswers, judge: Judge | None = None) -> RewardSource:
    """The source with these settings.

    Args:
        kept: answers that services gave this stage.
        judge: the run's own; None while its engines are not there, so that it can't be asked.

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
        # Only here: asyncio takes the start of a run 30 ms.
        from pipeline.rewards.http_requests import Requests
        from pipeline.rewards.services import ServiceSource, calling_of, service_of

        service, seconds, url = service_of(spec), spec.timeout_s, spec.url_asked
        if url is None:
            where = spec.says if judge is None else judge.where
            return ServiceSource(service, kept, where, lambda bodies: _there(judge).ask(bodies, seconds))
        calling = calling_of(spec, url)
        return ServiceSource(service, kept, url, lambda bodies: Requests(calling, bodies))
    assert isinstance(spec, RewardSpec)
    exact = spec.kind == "exact_match"
    return FunctionSource(spec, exact_match if exact else find_function(spec.source))


def _there(judge: Judge | None) -> Judge:
    assert judge is not None, "a judge was asked before its engines were there"
    return judge

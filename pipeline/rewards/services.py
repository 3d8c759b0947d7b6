"""Sources of reward that are asked over HTTP: what is sent about a sample, and how the answer is read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from actors.errors import UserError
from pipeline.rewards.functions import Samples
from pipeline.rewards.http_requests import Calling, Reply
from pipeline.rewards.judging import GIVEN, Unreadable, as_text, fields_of, question, said, verdict
from pipeline.rewards.kept_answers import KeptAnswers, content_key
from pipeline.rewards.spec import CodeReward, HttpReward, JudgeReward, ServiceSettings
from pipeline.rewards.values import RewardCall, cut, examined


class Service(ABC):
    """One kind of service: its requests, and the values in its answers."""

    per_request = 1
    """Samples of one request."""
    reads: Any = None
    """All beside the request that its answer's value depends on."""

    def __init__(self, spec: ServiceSettings) -> None:
        self.spec = spec

    @abstractmethod
    def content(self, samples: Samples, index: int) -> Any:
        """All that is sent about one sample, as JSON can hold it."""

    @abstractmethod
    def body(self, contents: Sequence[Any]) -> Any:
        """A request about some samples."""

    @abstractmethod
    def values(self, reply: Any, n: int) -> RewardCall:
        """Values of a request's `n` samples.

        Raises:
            Unreadable: there are none in the reply.
        """


class HttpService(Service):
    """Batches to a service of the user's: {"prompts", "completions", "columns"} -> {"rewards"}."""

    def __init__(self, spec: HttpReward) -> None:
        super().__init__(spec)
        self.per_request, self._columns = spec.batch_size, spec.columns

    def content(self, samples: Samples, index: int) -> Any:
        names = samples.columns if self._columns is None else self._columns
        columns = {name: samples.columns[name][index] for name in names}
        return [samples.prompts[index], samples.completions[index], columns]

    def body(self, contents: Sequence[Any]) -> Any:
        names = contents[0][2]
        return {
            "prompts": [prompt for prompt, _, _ in contents],
            "completions": [completion for _, completion, _ in contents],
            "columns": {name: [columns[name] for _, _, columns in contents] for name in names},
        }

    def values(self, reply: Any, n: int) -> RewardCall:
        if not isinstance(reply, dict) or not isinstance(reply.get("rewards"), list):
            raise Unreadable(f"it answered no JSON object with a list `rewards`: {cut(repr(reply))}")
        return examined(reply["rewards"], n)


class JudgeService(Service):
    """A chat completion for each sample."""

    def __init__(self, spec: JudgeReward) -> None:
        super().__init__(spec)
        self._judge, self._template = spec, read_template(spec)
        self.reads = [spec.pattern, spec.json_key, spec.values]

    def content(self, samples: Samples, index: int) -> Any:
        values = {name: column[index] for name, column in samples.columns.items()}
        values |= {"prompt": samples.prompts[index], "completion": samples.completions[index]}
        return question(self._judge, self._template, values)

    def body(self, contents: Sequence[Any]) -> Any:
        return contents[0]

    def values(self, reply: Any, n: int) -> RewardCall:
        return RewardCall([verdict(self._judge, said(reply))])


class SandboxService(Service):
    """Code and its tests to a service that runs them: {"passed": [true, false]}."""

    def __init__(self, spec: CodeReward) -> None:
        super().__init__(spec)
        self._code = spec
        self.reads = spec.score

    def content(self, samples: Samples, index: int) -> Any:
        from pipeline.rewards.code_tests import code_of, tests_of

        return {
            "code": code_of(as_text(samples.completions[index])),
            "tests": tests_of(samples.columns[self._code.column][index]),
            "seconds": self._code.seconds,
            "memory_mb": self._code.memory_mb,
        }

    def body(self, contents: Sequence[Any]) -> Any:
        return contents[0]

    def values(self, reply: Any, n: int) -> RewardCall:
        from pipeline.rewards.code_tests import score_of

        passed = reply.get("passed") if isinstance(reply, dict) else None
        if not isinstance(passed, list) or not all(isinstance(one, bool) for one in passed):
            raise Unreadable(
                f"it answered no JSON object with a list `passed` of booleans: {cut(repr(reply))}"
            )
        return RewardCall([score_of(passed, self._code.score)])


class Asked(Protocol):
    """Requests under way."""

    def result(self) -> list[Reply]:
        """A reply to each, in time."""


class Judge(Protocol):
    """A judge that the run serves itself."""

    where: str
    """The model and its weights."""

    def ask(self, bodies: Sequence[Any], timeout_s: float) -> Asked:
        """Let it answer chat completions."""


Asking = Callable[[Sequence[Any]], Asked]
"""Sends requests, by their bodies."""


class ServiceSource:
    """A service as a stage asks it: unlike questions only, once each, and those known from before never."""

    def __init__(self, service: Service, kept: KeptAnswers, where: str, ask: Asking) -> None:
        """`where`: the place that answers, a part of what was asked; `ask`: sends requests there."""
        self._service, self._kept, self._where, self._ask = service, kept, where, ask

    def begin(self, samples: Samples) -> Callable[[], RewardCall]:
        """Send what has to be asked about these samples; the result waits for the answers."""
        service = self._service
        contents: dict[str, Any] = {}
        keys: list[str] = []
        problems: dict[str, str] = {}
        for index in range(len(samples)):
            try:
                content = service.content(samples, index)
                key = content_key([self._where, content, service.reads])
                contents[key] = content
            except (TypeError, ValueError) as error:
                key = f"sample {index}"
                problems[key] = f"sample {index} can't be sent as JSON ({error})"
            keys.append(key)
        known = self._kept.known(set(contents))
        asked = [key for key in contents if key not in known]
        size = service.per_request
        parts = [asked[start : start + size] for start in range(0, len(asked), size)]
        bodies = [service.body([contents[key] for key in part]) for part in parts]
        requests = self._ask(bodies) if bodies else None

        def result() -> RewardCall:
            new: dict[str, float | None] = {}
            for part, reply in zip(parts, requests.result() if requests is not None else [], strict=True):
                self._read(part, reply, new, problems)
            if service.spec.on_error != "stop":  # A run that goes on must not have another number there.
                new |= dict.fromkeys(problems.keys() & contents.keys(), service.spec.on_error)
            answers = known | self._kept.keep(new)
            bad = tuple(i for i, key in enumerate(keys) if key in problems)
            values = [answers.get(key) for key in keys]
            return RewardCall(values, f"{service.spec.says}: {problems[keys[bad[0]]]}" if bad else "", bad)

        return result

    def _read(
        self, part: list[str], reply: Reply, new: dict[str, float | None], problems: dict[str, str]
    ) -> None:
        """The answers of one request into `new`, and its problems by key."""
        if reply.problem:
            problems |= dict.fromkeys(part, reply.problem)
            return
        try:
            call = self._service.values(reply.value, len(part))
        except Unreadable as error:
            problems |= dict.fromkeys(part, str(error))
            return
        problems |= {part[i]: call.problem for i in call.bad}
        new |= {
            key: value
            for i, (key, value) in enumerate(zip(part, call.values, strict=True))
            if i not in call.bad
        }


def calling_of(spec: ServiceSettings, url: str) -> Calling:
    """Address, patience and key of a service.

    Raises:
        UserError: the key's variable is not set.
    """
    headers = {}
    if spec.api_key_env is not None:
        key = os.environ.get(spec.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"rewards: api_key_env: the environment variable {spec.api_key_env} is not set or empty; "
                "export it where the run starts (a submitted job gets it by ray.env)"
            )
        headers[spec.api_key_header] = f"Bearer {key}" if spec.api_key_header == "Authorization" else key
    return Calling(url, spec.timeout_s, spec.request_timeout_s, spec.retries, spec.max_in_flight, headers)


def service_of(spec: ServiceSettings) -> Service:
    """The service that a source's settings name.

    Raises:
        UserError: a judge's template can't be read.
    """
    if isinstance(spec, HttpReward):
        return HttpService(spec)
    if isinstance(spec, JudgeReward):
        return JudgeService(spec)
    assert isinstance(spec, CodeReward)
    return SandboxService(spec)


def read_template(spec: JudgeReward) -> str:
    """Text of a judge's template.

    Raises:
        UserError: it can't be read, or doesn't show the judge the completion.
    """
    try:
        text = Path(spec.prompt).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"rewards: prompt: '{spec.prompt}' can't be read ({why}); name a text file") from None
    if "completion" not in fields_of(text):
        raise UserError(
            f"rewards: prompt: '{spec.prompt}' has no {{completion}}, so the judge would see no answer"
        )
    return text


def template_columns(spec: JudgeReward) -> list[str]:
    """Columns of the data that a judge's template shows.

    Raises:
        UserError: it can't be read.
    """
    return [name for name in fields_of(read_template(spec)) if name not in GIVEN]

"""Settings of the sources of reward: functions and models by their names, services, and checks of answers.

An entry of `rewards:` with a `kind` is a source that has keys of its own; one without is a `source` by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from actors.models.spec import EMBEDDED_BASE, locate_embedded_base
from actors.spec import Spec

EXACT_MATCH = "exact_match"
FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
SECRET = re.compile(r"key|token|secret|passw|signature|credential|^sig$|^auth", re.IGNORECASE)
"""Names of a URL's parameters that hold what nobody should read in a config."""


def public_url(url: str) -> str:
    """A URL that may stand in a config, a log and a manifest.

    Raises:
        ValueError: it is none of http or https, or holds a secret.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"'{parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()}' is no http URL"
        )
    secret = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if SECRET.search(name)]
    if parts.username is not None or secret:
        where = f"as `{secret[0]}`" if secret else "before the @"
        raise ValueError(
            f"the URL of {parts.hostname} holds a secret {where}, which would be written into the run's "
            "files; put it into an environment variable and name that: api_key_env: MY_VARIABLE"
        )
    return url


Url = Annotated[str, AfterValidator(public_url)]


class RewardSettings(Spec):
    """Settings that every source of reward has."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this reward in the sum. 0: it is only logged, and a sample that nothing else scores has no
    reward."""
    timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds for all samples of a step: for one call of a function, or for all requests to a service with
    their repetitions."""
    on_error: Literal["stop"] | float = "stop"
    """Effect of a function's or a service's failure: `stop` ends the run; a number is the reward of the
    samples concerned."""

    @model_validator(mode="after")
    def _finite_default(self) -> RewardSettings:
        if self.on_error != "stop" and not math.isfinite(self.on_error):
            raise ValueError("on_error is `stop` or a finite number")
        return self

    @property
    def name(self) -> str:
        """Name in metrics."""
        raise NotImplementedError

    @property
    def says(self) -> str:
        """The source in a few words."""
        raise NotImplementedError

    @property
    def reward_model(self) -> str | None:
        """Reward stage or directory that scores on the run's own processes; None: something else does."""
        return None

    @property
    def judge_model(self) -> str | None:
        """Hub id or directory of the model that the run's own engines judge with; None: they don't."""
        return None

    @property
    def function(self) -> str | None:
        """`module:function` of the user's that scores; None: something else does."""
        return None

    @property
    def file(self) -> str | None:
        """File that it reads, relative to the working directory."""
        return None

    @property
    def columns_needed(self) -> tuple[str, ...]:
        """Columns of the data without which it can't score."""
        return ()


class RewardSpec(RewardSettings):
    """One source of reward by its name. A bare string in the configuration is a `source`."""

    source: str = Field(min_length=1)
    """`exact_match`, `module:function`, an earlier reward stage, or the directory of a reward model."""

    @model_validator(mode="before")
    @classmethod
    def _bare_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

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

    @property
    def says(self) -> str:
        return self.source

    @property
    def reward_model(self) -> str | None:
        return self.source if self.kind == "model" else None

    @property
    def function(self) -> str | None:
        return self.source if self.kind == "function" else None

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return ("answer",) if self.kind == "exact_match" else ()


class ServiceSettings(RewardSettings):
    """Settings of a source that is asked over HTTP."""

    request_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Seconds for one request; then it is sent again, while `retries` and `timeout_s` last."""
    retries: int = Field(default=5, ge=0)
    """Times that a request is sent again after a failed connection, no answer in time, or the status 408, 429
    or 5xx: after up to 0.5, 1, 2, ... 30 s, drawn evenly, but no sooner than its Retry-After asks."""
    max_in_flight: int = Field(default=256, ge=1)
    """Requests at a time, each on a connection of its own."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_]\w*$")
    """Environment variable with the service's key, sent as `Authorization: Bearer KEY`."""
    api_key_header: str = Field(default="Authorization", pattern=r"^[A-Za-z0-9-]+$")
    """Header of the key; in another one than `Authorization` it stands alone."""

    @property
    def url_asked(self) -> str | None:
        """URL that requests go to; None: nothing is asked over HTTP."""
        raise NotImplementedError


class HttpReward(ServiceSettings):
    """A service of one's own that scores batches of samples."""

    kind: Literal["http"] = "http"
    """A service that is asked over HTTP; docs/online.md has its request and response."""
    url: Url
    """Where requests are posted to."""
    batch_size: int = Field(default=32, ge=1)
    """Samples of one request."""
    columns: list[str] | None = None
    """Columns of the data that are sent along; null: all of them."""

    @property
    def name(self) -> str:
        return "http"

    @property
    def says(self) -> str:
        return self.url

    @property
    def url_asked(self) -> str | None:
        return self.url

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return tuple(self.columns or ())


class JudgeReward(ServiceSettings):
    """A language model that scores one sample at a time, in words."""

    kind: Literal["judge"] = "judge"
    """A language model behind an OpenAI-compatible endpoint, or in engines of the run."""
    endpoint: Url | None = None
    """The endpoint up to its version: `http://host:8000/v1`. `vllm serve MODEL` is one. Null: the engines of
    `roles.judge` serve the model."""
    model: str = Field(min_length=1)
    """Name of the model there; without an endpoint a hub id or a directory."""
    prompt: str = Field(min_length=1)
    """Text file with what the model is asked: {prompt}, {completion} and columns of the row in braces."""
    pattern: str | None = None
    """Regular expression of the verdict, whose group is the number; the last one in the answer counts. Null:
    a JSON object's `json_key`."""
    json_key: str = "score"
    """Without `pattern`: key of the verdict in the last JSON object of the answer."""
    values: dict[str, float] = Field(default_factory=dict)
    """Numbers of verdicts that are words: `{yes: 1, no: 0}`."""
    max_tokens: int = Field(default=512, ge=1)
    """Tokens of the judge's answer."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, such as `{chat_template_kwargs: {enable_thinking: false}}`; without an
    endpoint only that one."""

    @model_validator(mode="after")
    def _verdict_can_be_read(self) -> JudgeReward:
        try:
            groups = 1 if self.pattern is None else re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern '{self.pattern}' is no regular expression ({error})") from None
        if groups != 1:
            raise ValueError(f"pattern '{self.pattern}' has {groups} groups; the verdict is the one group")
        return self

    @model_validator(mode="after")
    def _engines_are_asked_alike(self) -> JudgeReward:
        more = sorted(set(self.extra_body) - {"chat_template_kwargs"})
        if self.endpoint is None and more:
            raise ValueError(
                f"extra_body: {', '.join(more)}: without an endpoint only chat_template_kwargs; greedy it is"
            )
        return self

    @property
    def name(self) -> str:
        return "judge"

    @property
    def says(self) -> str:
        return self.model if self.endpoint is None else f"{self.model} at {self.endpoint}"

    @property
    def judge_model(self) -> str | None:
        if self.endpoint is not None:
            return None
        return locate_embedded_base() if self.model == EMBEDDED_BASE else self.model

    @property
    def url_asked(self) -> str | None:
        return None if self.endpoint is None else self.endpoint.rstrip("/") + "/chat/completions"

    @property
    def file(self) -> str | None:
        return self.prompt


class MathReward(RewardSettings):
    """Mathematical equality with the right answer, by math-verify."""

    kind: Literal["math"] = "math"
    """1 where the completion's answer equals the row's, as math-verify reads both."""
    column: str = "answer"
    """Column of the right answer."""

    @property
    def name(self) -> str:
        return "math"

    @property
    def says(self) -> str:
        return "math-verify"

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return (self.column,)


class CodeReward(ServiceSettings):
    """Tests that the completion's Python code has to pass."""

    kind: Literal["code"] = "code"
    """The share of the row's tests that the completion's code passes."""
    column: str = "tests"
    """Column of the tests: Python text, or a list of such, each a test of its own."""
    score: Literal["share", "all"] = "share"
    """Reward: the share of tests that pass, or 1 where all do and else 0."""
    seconds: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """Seconds for the code and all its tests."""
    memory_mb: int = Field(default=1024, ge=64)
    """MiB of address space for each of its processes."""
    processes: int = Field(default=16, ge=1)
    """Processes and threads that it may have."""
    sandbox: Url | None = None
    """URL of a service that runs the tests instead; docs/online.md has its request and response."""

    @property
    def name(self) -> str:
        return "code"

    @property
    def says(self) -> str:
        return "tests of code" + (f" at {self.sandbox}" if self.sandbox else "")

    @property
    def url_asked(self) -> str | None:
        return self.sandbox

    @property
    def columns_needed(self) -> tuple[str, ...]:
        return (self.column,)


KINDS: dict[str, type[RewardSettings]] = {
    "http": HttpReward,
    "judge": JudgeReward,
    "math": MathReward,
    "code": CodeReward,
}
"""Sources with keys of their own, by `kind`."""
NAMED = "named"
"""Tag of entries without a kind; no key of theirs, as tags stand among keys in pydantic's messages."""


def _arm(value: Any) -> str | None:
    """Name of the class that an entry of `rewards:` is read as; None: its `kind` is none."""
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if isinstance(value, RewardSpec) or kind is None:
        return NAMED
    return kind if kind in KINDS else None


AnyReward = Annotated[
    Annotated[RewardSpec, Tag(NAMED)]
    | Annotated[HttpReward, Tag("http")]
    | Annotated[JudgeReward, Tag("judge")]
    | Annotated[MathReward, Tag("math")]
    | Annotated[CodeReward, Tag("code")],
    Discriminator(
        _arm,
        custom_error_type="reward_kind",
        custom_error_message=f"its kind is none of {', '.join(KINDS)}; a function, a reward stage or a "
        "reward model's directory is a `source` and has no kind",
    ),
]
"""An entry of `rewards:`."""


def reward_names(specs: Sequence[RewardSettings]) -> list[str]:
    """A name for each source; repeated ones are numbered (`length`, `length-2`)."""
    seen: dict[str, int] = {}
    names = []
    for spec in specs:
        seen[spec.name] = seen.get(spec.name, 0) + 1
        names.append(spec.name if seen[spec.name] == 1 else f"{spec.name}-{seen[spec.name]}")
    return names

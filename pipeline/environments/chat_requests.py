"""Requests for chat completions of an agent, read strictly, and their answers. Pure.

A request is refused where its answer would not be what is trained: with another way of sampling than the
stage's, or with messages that don't go on from what was drawn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.rewards.values import shown_value

Message = dict[str, Any]

_READ = frozenset({"messages", "model", "tools", "max_tokens", "max_completion_tokens", "logprobs"})
_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
)
"""Keys that say nothing of how the answer is made."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


class Refused(Exception):
    """Raised for a request that can't be answered; its text is for whoever wrote the agent."""


class StageSampling(NamedTuple):
    """The stage's way of sampling, as far as a request may name it."""

    temperature: float
    stop: list[str]
    tool_parser: str | None


class AgentRequest(NamedTuple):
    """A turn that an agent asks for."""

    messages: list[Message] | None
    """Those behind the last turn; of the first request all, or None for the row's prompt as it stands."""
    tools: list[dict[str, Any]] | None
    """Schemas of the tools that the policy may call; the same in each request of a conversation."""
    max_tokens: int | None
    """New tokens of the turn, at most; None: as many as there is room for."""
    logprobs: bool
    """The answer shall have its tokens' log-probabilities."""


class DrawnTurn(NamedTuple):
    """Facts of a turn that the engine drew, beside its message."""

    finish: str
    """`stop` or `length`."""
    prompt_tokens: int
    completion_tokens: int
    tokens: list[tuple[str, float]] | None
    """Text and log-probability of each token, where they were asked for."""


def read_request(
    body: Any,
    sampling: StageSampling,
    prompt: Sequence[Message],
    conversation: Sequence[Message] | None,
    tools: list[dict[str, Any]] | None,
) -> AgentRequest:
    """The turn that a request asks for.

    Args:
        body: the request's JSON.
        prompt: of the sample's row.
        conversation: all messages so far, the policy's turn last; None: this is the first request.
        tools: of the requests before.

    Raises:
        Refused: with every problem.
    """
    if not isinstance(body, dict):
        raise Refused("the request is no JSON object")
    given = {key: value for key, value in body.items() if value is not None}
    problems = [*_sampling_problems(given, sampling)]
    limits = [given[key] for key in ("max_tokens", "max_completion_tokens") if key in given]
    problems += [
        f"{one!r} as the largest number of tokens is no whole number above 0"
        for one in limits
        if type(one) is not int or one < 1
    ]
    asked = given.get("tools") or None
    problems += _tool_problems(asked, sampling.tool_parser)
    if not problems and conversation is not None and asked != tools:
        problems.append("`tools` are other ones than in the conversation's first request")
    messages: list[Message] = []
    try:
        messages = _messages(given.get("messages"))
        if conversation is not None:
            messages = added(conversation, messages)
    except Refused as refused:
        problems.append(str(refused))
    if problems:
        raise Refused("; ".join(problems))
    as_it_stands = conversation is None and list(map(_compared, prompt)) == list(map(_compared, messages))
    return AgentRequest(
        None if as_it_stands else messages,
        asked,
        min(limits, default=None),
        bool(given.get("logprobs", False)),
    )


def added(conversation: Sequence[Message], messages: Sequence[Message]) -> list[Message]:
    """The messages of a request behind the conversation so far.

    Raises:
        Refused: they don't go on from it, with what differs.
    """
    advice = "an agent sends all messages again as they were, the answers as it got them, and adds its own"
    for i, (had, has) in enumerate(zip(conversation, messages, strict=False)):
        if _compared(had) != _compared(has):
            whose = "the policy's turn" if had["role"] == "assistant" else f"of role {had['role']}"
            changed = f"{_short(had)} is {_short(has)} in this request"
            raise Refused(f"messages[{i}], {whose}, has changed: {changed}; {advice}")
    if len(messages) < len(conversation):
        raise Refused(
            f"the conversation has {len(conversation)} messages, of which the request has only the first "
            f"{len(messages)}; {advice}"
        )
    new = list(messages[len(conversation) :])
    if not new:
        raise Refused(f"the request asks once more for an answer to what was answered already; {advice}")
    if any(message["role"] == "assistant" for message in new):
        raise Refused(f"the request adds a message of the assistant, whose turns are the policy's; {advice}")
    names = {
        call["id"]: call["function"]["name"]
        for message in conversation
        for call in message.get("tool_calls") or []
        if "id" in call
    }
    return [
        message | ({"name": names[message["tool_call_id"]]} if message.get("tool_call_id") in names else {})
        for message in new
    ]


def completion(model: str, message: Message, turn: DrawnTurn, name: str) -> dict[str, Any]:
    """The answer to a request: OpenAI's `chat.completion` with one choice. `message`: the policy's turn."""
    content = None
    if turn.tokens is not None:
        content = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in turn.tokens
        ]
    finish = "tool_calls" if message.get("tool_calls") else turn.finish
    return {
        "id": name,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "finish_reason": finish,
                "logprobs": None if content is None else {"content": content, "refusal": None},
            }
        ],
        "usage": {
            "prompt_tokens": turn.prompt_tokens,
            "completion_tokens": turn.completion_tokens,
            "total_tokens": turn.prompt_tokens + turn.completion_tokens,
        },
    }


def problem_of(text: str, code: str | None = None) -> dict[str, Any]:
    """The body of a refusal, in OpenAI's form."""
    return {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": code}}


# --- Inside -------------------------------------------------------------------------------------------


def _sampling_problems(given: Mapping[str, Any], sampling: StageSampling) -> list[str]:
    """Keys by which the turn would be drawn otherwise than the stage draws."""
    same: dict[str, tuple[Any, ...]] = {
        "temperature": (sampling.temperature,), "stop": (sampling.stop, *sampling.stop[:1]), "n": (1,),
        "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,),
        "frequency_penalty": (0,), "logit_bias": ({},), "top_logprobs": (0,), "stream": (False,),
        "tool_choice": ("auto",), "parallel_tool_calls": (True,), "response_format": ({"type": "text"},),
    }  # fmt: skip
    problems = []
    for key, value in given.items():
        if key in same and value not in same[key]:
            problems.append(f"`{key}` is {shown_value(value)}, and can only be {shown_value(same[key][0])}")
        elif key not in same and key not in _READ | _WITHOUT_EFFECT:
            problems.append(f"`{key}` is not known here")
    if not problems:
        return []
    return [
        *problems,
        "turns are drawn as the stage says, since that is what is trained; leave these keys out",
    ]


def _tool_problems(tools: Any, parser: str | None) -> list[str]:
    if tools is None:
        return []
    if parser is None:
        return ["`tools` need a `tool_parser` in the stage's settings, which finds the calls in a turn"]
    fits = isinstance(tools, list) and all(
        isinstance(tool, dict)
        and isinstance(tool.get("function"), dict)
        and isinstance(tool["function"].get("name"), str)
        for tool in tools
    )
    return [] if fits else ['`tools` is no list of {"type": "function", "function": {"name": ...}}']


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Refused("`messages` is no list with a message")
    made = [_message(one, f"messages[{i}]") for i, one in enumerate(value)]
    if made[-1]["role"] == "assistant":
        raise Refused("the last of `messages` is the assistant's, and an answer follows somebody else's")
    return made


def _message(value: Any, where: str) -> Message:
    """A message with text as content, and no key without a value."""
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise Refused(f"{where} is no object with a `role` ({', '.join(_ROLES)})")
    role, content = value["role"], value.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise Refused(f"{where}.content has a part that is no text")
        content = "".join(texts)
    calls = value.get("tool_calls") or []
    if not isinstance(calls, list) or not all(
        isinstance(call, dict)
        and isinstance(call.get("function"), dict)
        and isinstance(call["function"].get("name"), str)
        for call in calls
    ):
        raise Refused(f"{where}.tool_calls is no list of calls of functions")
    if not isinstance(content, str) and not (content is None and calls):
        raise Refused(f"{where}.content is {shown_value(content)}, not text")
    known = {"role", "content", "tool_calls", "tool_call_id", "name"}
    if more := [key for key, one in value.items() if one and key not in known]:
        raise Refused(f"{where} has {', '.join(sorted(map(str, more)))}, which is not known here")
    names = {key: value[key] for key in ("tool_call_id", "name") if isinstance(value.get(key), str)}
    return {"role": role, "content": content or "", **names, **({"tool_calls": calls} if calls else {})}


def _compared(message: Message) -> tuple[Any, ...]:
    """What of a message has to stay as it was."""
    calls = [
        (call.get("id"), call["function"]["name"], _arguments(call["function"].get("arguments")))
        for call in message.get("tool_calls") or []
    ]
    return message["role"], message.get("content") or "", calls


def _arguments(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _short(message: Message) -> str:
    calls = [call["function"]["name"] for call in message.get("tool_calls") or []]
    return shown_value(message.get("content") or "") + (f" with calls of {', '.join(calls)}" if calls else "")

"""Agents of the tests: each drives a conversation by a client of its own."""

from __future__ import annotations

import os
import random
import re
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import OpenAI

QUESTION = {"role": "user", "content": "Which digit?"}
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}


def client_of(base_url: str, api_key: str) -> OpenAI:
    from openai import OpenAI

    return OpenAI(base_url=base_url, api_key=api_key)


def guess(row: dict[str, Any], seed: int, base_url: str, api_key: str) -> float:
    """`worlds.Guess` as an agent: guess a number, at most five times."""
    secret, client = random.Random(seed).randrange(10), client_of(base_url, api_key)
    messages: list[Any] = [*row["prompt"], QUESTION]
    for _ in range(5):
        said = client.chat.completions.create(model="any", messages=messages).choices[0].message
        messages.append(said)
        if said.content == str(secret):
            return 1.0
        if said.content == "crash":
            os._exit(3)
        if said.content == "raise":
            raise ValueError("a fault")
        if said.content == "hang":
            time.sleep(60)
        if said.content == "hold":
            re.match(r"(a+)+$", "a" * 64 + "b")
        messages.append({"role": "user", "content": f"not {said.content}"})
    return 0.0


async def guess_too(row: dict[str, Any], seed: int, base_url: str, api_key: str) -> float:
    """The same, as a coroutine."""
    from openai import AsyncOpenAI

    secret, client = random.Random(seed).randrange(10), AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages: list[Any] = [*row["prompt"], QUESTION]
    for _ in range(5):
        made = await client.chat.completions.create(model="any", messages=messages)
        said = made.choices[0].message.content
        if said == str(secret):
            return 1.0
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"not {said}"}]
    return 0.0


def once(prompt: list[Any], base_url: str, api_key: str) -> float:
    """One turn on the row's prompt as it stands, whose answer has all that a client may read."""
    client = client_of(base_url, api_key)
    made = client.chat.completions.create(
        model="mine", messages=prompt, max_completion_tokens=3, logprobs=True, temperature=1.0
    )
    choice, usage = made.choices[0], made.usage
    assert choice.logprobs is not None
    assert usage is not None
    tokens = choice.logprobs.content or []
    assert (made.model, choice.finish_reason, choice.message.content) == ("mine", "length", "abc")
    assert ["".join(token.token for token in tokens), *{token.logprob for token in tokens}] == ["abc", -0.25]
    assert usage.completion_tokens == 3
    assert usage.total_tokens == usage.prompt_tokens + 3
    assert [model.id for model in client.models.list()] == ["policy"]
    return 0.5


def called(base_url: str, api_key: str) -> float:
    """Offers a tool, answers its call, and is answered."""
    client, messages = client_of(base_url, api_key), [{"role": "user", "content": "Add."}]
    ask: dict[str, Any] = {"model": "any", "tools": [ADD], "tool_choice": "auto"}
    first = client.chat.completions.create(messages=messages, **ask).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls or []
    told = {
        "role": "tool",
        "tool_call_id": call.id,
        "content": f"{call.function.name} {call.function.arguments}",
    }
    messages += [first.message.model_dump(), told]
    last = client.chat.completions.create(messages=messages, **ask).choices[0]
    assert (last.finish_reason, last.message.tool_calls) == ("stop", None)
    return 2.0


def endless(prompt: list[Any], base_url: str, api_key: str) -> float:
    """Goes on until it is told that there is no room."""
    from openai import BadRequestError

    client, messages = client_of(base_url, api_key), list(prompt)
    while True:
        try:
            said = client.chat.completions.create(model="any", messages=messages).choices[0].message
        except BadRequestError as error:
            return 0.25 if error.code == "context_length_exceeded" else 0.0
        messages += [said, {"role": "user", "content": "go on"}]


def impatient(prompt: list[Any], base_url: str, api_key: str) -> float:
    """Sends a request again before it is answered."""
    client = client_of(base_url, api_key).with_options(timeout=0.4, max_retries=5)
    return float(client.chat.completions.create(model="any", messages=prompt).choices[0].message.content or 0)


class Class:
    """No function."""


def silent(base_url: str, api_key: str) -> None:
    """Asks for nothing."""


def deaf(row: dict[str, Any]) -> None:
    """Can't ask."""

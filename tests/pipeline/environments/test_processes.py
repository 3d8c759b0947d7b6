"""Environments in a process of their own: both forms, and all that can go wrong in one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.environments.processes import (
    NOT_REPLAYED,
    EnvironmentProcess,
    EnvironmentReply,
    kept_environment,
)
from pipeline.rewards.user_functions import functions_closed

HERE = "tests.pipeline.environments.worlds"
ROW: dict[str, Any] = {"prompt": [{"role": "user", "content": "Guess."}], "start": 3}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    with functions_closed():
        yield


def environments(
    name: str | None, tools: tuple[str, ...] = (), timeout_s: float = 30.0
) -> EnvironmentProcess:
    return kept_environment(f"{HERE}:{name}" if name else None, [f"{HERE}:{one}" for one in tools], timeout_s)


def answers(process: EnvironmentProcess, wanted: int, within: float = 60.0) -> dict[int, EnvironmentReply]:
    found: dict[int, EnvironmentReply] = {}
    deadline = time.monotonic() + within
    while len(found) < wanted and time.monotonic() < deadline:
        found |= {reply.number: reply for reply in process.replies(0.5)}
    assert len(found) == wanted
    return found


def said(text: str, **more: Any) -> list[dict[str, Any]]:
    return [*ROW["prompt"], {"role": "assistant", "content": text, **more}]


def begun(process: EnvironmentProcess, numbers: range) -> None:
    for number in numbers:
        process.reset(number, ROW, seed=number)
    answers(process, len(numbers))


def secret(number: int) -> str:
    import random

    return str(random.Random(number).randrange(10))


def test_an_object_for_each_sample_is_made_from_its_row_and_seed() -> None:
    process = environments("Guess")
    assert process.described() == {"steps": True, "rewards": False, "tools": []}
    process.reset(0, ROW, 5)
    assert answers(process, 1)[0].value[-1]["content"] == "Which digit?"
    begun(process, range(1, 3))
    for number in (1, 2):
        process.step(number, said(secret(1)))
    found = answers(process, 2)
    assert found[1].value == ([], 1.0, True)
    assert found[2].value == ([{"role": "user", "content": f"not {secret(1)}"}], 0.0, False)


def test_environments_of_trls_form_are_their_methods_as_tools_and_score_themselves() -> None:
    process = environments("Counter")
    kind = process.described()
    assert isinstance(kind, dict)
    assert [tool["function"]["name"] for tool in kind["tools"]] == ["increment"]
    assert list(kind["tools"][0]["function"]["parameters"]["properties"]) == ["step"]
    process.reset(0, ROW, 0)
    assert answers(process, 1)[0].value == " It is 3."
    calls = [
        {"id": str(i), "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(
            [("increment", '{"step": 4}'), ("other", ""), ("increment", "[")]
        )
    ]
    process.step(0, said("", tool_calls=calls))
    messages, reward, done = answers(process, 1)[0].value
    assert (reward, done) == (None, False)
    assert [message["content"] for message in messages][:2] == ["7", "{'error': 'Tool other not found.'}"]
    assert "error" in messages[2]["content"]
    process.step(0, said("done"))
    assert answers(process, 1)[0].value == ([], None, True)
    process.end(0)
    assert answers(process, 1)[0].value == 7.0


def test_tools_alone_are_functions_with_hints_and_docstrings() -> None:
    process = environments(None, ("add",))
    kind = process.described()
    assert isinstance(kind, dict)
    assert kind["tools"][0]["function"]["description"] == "Add two numbers."
    begun(process, range(1))
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    process.step(0, said("", tool_calls=[call]))
    answer = {"role": "tool", "name": "add", "tool_call_id": "1", "content": "3"}
    assert answers(process, 1)[0].value == ([answer], None, False)


@pytest.mark.parametrize(
    ("env", "tools", "problem"),
    [
        ("NotOne", (), "neither `step` nor a public method"),
        ("add", (), "has no method `reset`"),
        ("Missing", (), "has no attribute 'Missing'"),
        (None, ("undocumented",), "tool undocumented: .*docstring"),
    ],
)
def test_what_is_no_environment_or_tool_is_described_with_the_reason(
    env: str | None, tools: tuple[str, ...], problem: str
) -> None:
    import re

    found = environments(env, tools).described()
    assert isinstance(found, str)
    assert re.search(problem, found, re.DOTALL)


def test_coroutines_of_many_samples_go_on_together() -> None:
    process = environments("Slow")
    process.described()
    begun(process, range(16))
    since = time.monotonic()
    for number in range(16):
        process.step(number, said("a"))
    answers(process, 16)
    assert time.monotonic() - since < 1.0  # One after the other they would take 1.6 s.


@pytest.mark.parametrize(
    ("text", "problem"),
    [("raise", "it raised ValueError: a fault"), ("crash", "exit code 3"), ("hang", "no answer within 1 s")],
)
def test_a_step_that_fails_ends_its_sample_and_the_others_go_on(text: str, problem: str) -> None:
    process = environments("Guess", timeout_s=1.0)
    process.described()
    begun(process, range(3))
    process.step(0, said("forever"))
    assert answers(process, 1)[0].value[0][0]["content"] == "again"
    for number, what in [(0, secret(0)), (1, text), (2, secret(2))]:
        process.step(number, said(what))
    found = answers(process, 3)
    assert problem in found[1].problem
    # Their environments were made again where the process was lost, from seed and messages.
    assert found[0].value == found[2].value == ([], 1.0, True)


def test_a_coroutine_that_waits_too_long_ends_alone_in_the_same_process() -> None:
    process = environments("Slow", timeout_s=1.0)
    process.described()
    begun(process, range(2))
    pid = process._popen.pid
    for number, what in [(0, "hang"), (1, "a")]:
        process.step(number, said(what))
    found = answers(process, 2)
    assert found[0].problem == "no answer within 1 s"
    assert found[1].value[1] == 0.5
    assert process._popen.pid == pid


def test_an_environment_that_does_not_follow_from_its_seed_can_not_be_gone_on_with() -> None:
    process = environments("Fickle", timeout_s=1.0)
    process.described()
    begun(process, range(2))
    process.step(0, said("forever"))
    answers(process, 1)
    process.step(1, said("crash"))
    assert "exit code 3" in answers(process, 1)[1].problem
    process.step(0, said("more"))
    assert answers(process, 1)[0].problem == NOT_REPLAYED


def test_a_process_can_be_taken_by_the_next_conversation_in_the_middle_of_a_step() -> None:
    process = environments("Guess")
    process.described()
    begun(process, range(1))
    process.step(0, said("hang"))
    process.forget_all()
    process.described()
    begun(process, range(1))
    process.step(0, said(secret(0)))
    assert answers(process, 1)[0].value[2] is True

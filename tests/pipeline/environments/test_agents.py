"""Agents that drive their conversations by a stock client: the samples of an environment, and refusals."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from actors.batches import Said
from actors.errors import RunFailure, UserError
from pipeline.environments.chat_requests import AgentRequest, Refused, StageSampling, read_request
from pipeline.environments.episodes import turn_seed
from pipeline.environments.prepared import describe
from pipeline.environments.spec import TurnSettings
from pipeline.rewards.user_functions import functions_closed
from tests.pipeline.data.tokens.one_row import CHATML
from tests.pipeline.environments.played import TOKENIZER, digit, play
from tests.pipeline.environments.test_episodes import transcript

HERE = "tests.pipeline.environments.talkers"
ASKED = [{"role": "user", "content": "Guess."}]
TALK = [*ASKED, {"role": "assistant", "content": "4"}]
WAY = StageSampling(0.5, [], "hermes")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    with functions_closed():
        yield


def agents(name: str, *given: Any, **more: Any) -> Any:
    return play(*given, env=None, agent=f"{HERE}:{name}", **more)


def test_an_agent_gives_the_samples_of_the_environment_that_says_the_same() -> None:
    wanted = play(max_tool_calling_iterations=4)
    for name, order in (("guess", 0), ("guess", 1), ("guess_too", 2)):
        made = agents(name, order=order)
        for key, values in wanted.arrays().items():
            if key != "turn_rewards":
                assert np.array_equal(values, made.arrays()[key]), key
        assert np.nansum(made.turn_rewards) == np.nansum(wanted.turn_rewards)
        assert {one.ended for one in made.episodes or ()} == {"done"}


def test_a_prompt_that_an_agent_sends_as_it_stands_keeps_its_ids_and_a_turn_its_limit() -> None:
    made = agents("once", lambda text, seed: "abcdef", 2)
    assert transcript(made, 0) == "abc"
    assert np.nansum(made.turn_rewards) == 1.0
    assert {(one.turns, one.ended) for one in made.episodes or ()} == {(1, "done")}


def test_a_request_that_a_client_sends_again_gets_the_answer_to_the_first_one() -> None:
    def speak(text: str, seed: int) -> str:
        time.sleep(1.0)
        return "3"

    made = agents("impatient", speak, 2)
    assert np.nansum(made.turn_rewards) == 6.0
    assert [one.turns for one in made.episodes or ()] == [1, 1]


def test_tools_are_those_of_the_requests() -> None:
    TOKENIZER.chat_template = (
        "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.name }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def parse(text: str) -> Said:
        return Said("", [("add", '{"a": 4}')]) if text == "call" else Said(text, [])

    def speak(text: str, seed: int) -> str:
        return "done" if "<|im_start|>tool" in text else "call"

    try:
        made = agents("called", speak, 2, parse=parse, tool_parser="hermes")
    finally:
        TOKENIZER.chat_template = CHATML
    (one, _) = made.episodes or ()
    assert '"name": "add"' in one.prompt_text
    assert transcript(made, 0) == (
        'call<|im_end|>\n<|im_start|>tool\naddadd {"a": 4}<|im_end|>\n<|im_start|>assistant\ndone<|im_end|>'
    )
    assert np.nansum(made.turn_rewards) == 4.0


def test_an_agent_is_told_at_a_limit_and_may_still_return_a_reward() -> None:
    for more, ended in (({"limit": 120}, "tokens"), ({"max_tool_calling_iterations": 2}, "turns")):
        made = agents("endless", lambda text, seed: "x", 2, **more)
        assert {one.ended for one in made.episodes or ()} == {ended}
        assert np.nansum(made.turn_rewards) == 0.5


@pytest.mark.parametrize(
    "text",
    ["raise", "crash", *(pytest.param(one, marks=pytest.mark.slow) for one in ("hang", "hold"))],
)
def test_an_agent_that_fails_ends_its_sample_and_the_others_go_on(text: str) -> None:
    def speak(so_far: str, seed: int) -> str:
        return text if seed == turn_seed(102, 1) else digit(so_far, seed)

    # What clients take to load counts, and this machine may be busy.
    late = {"env_timeout_s": 10.0} if text in ("hang", "hold") else {}
    if text == "raise":
        with pytest.raises(RunFailure, match=r"(?s)agent 'guess'.*it raised ValueError: a fault.*'raise'"):
            agents("guess", speak)
    made = agents("guess", speak, env_on_error=-1.0, **late)
    assert [one.ended for one in made.episodes or ()] == ["error" if i == 2 else "done" for i in range(6)]
    assert made.select([2]).turn_rewards[-1] == -1.0
    kept = [0, 1, 3, 4, 5]
    assert (
        made.select(kept).token_ids.tolist()
        == play(max_tool_calling_iterations=4).select(kept).token_ids.tolist()
    )


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"messages": ASKED}, r"has 2 messages, of which the request has only the first 1"),
        ({"messages": TALK}, r"the last of `messages` is the assistant's"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "5"}, *ASKED]},
         r"messages\[1\], the policy's turn, has changed: '4' is '5'"),
        ({"messages": [{"role": "user", "content": "More."}, TALK[1], *ASKED]}, r"messages\[0\], of role u"),
        ({"messages": [*TALK, TALK[1], *ASKED]}, "adds a message of the assistant"),
        ({"messages": [*TALK, *ASKED], "temperature": 1.0}, "`temperature` is 1.0, and can only be 0.5"),
        ({"messages": [*TALK, *ASKED], "seed": 5}, "`seed` is not known here"),
        ({"messages": [*TALK, *ASKED], "stream": True}, "`stream` is True"),
        ({"messages": [*TALK, *ASKED], "max_tokens": 0}, "no whole number above 0"),
        ({"messages": [*TALK, *ASKED], "tools": [{"type": "function", "function": {"name": "a"}}]},
         "`tools` are other ones"),
        ({"messages": [*TALK, {"role": "user", "content": [{"type": "image_url"}]}]}, "a part that is no te"),
        ({}, "`messages` is no list"),
        ([], "no JSON object"),
    ],
)  # fmt: skip
def test_a_request_that_would_not_be_what_is_trained_is_refused(body: Any, problem: str) -> None:
    with pytest.raises(Refused, match=problem):
        read_request(body, WAY, ASKED, TALK, None)


def test_a_request_goes_on_from_the_turns_in_any_form_that_clients_give_them() -> None:
    call = {"id": "000100000", "type": "function", "function": {"name": "add", "arguments": '{"a":  4}'}}
    drawn = {"role": "assistant", "content": "", "tool_calls": [call]}
    echoed = {
        "role": "assistant", "content": None, "refusal": None, "annotations": [],
        "tool_calls": [call | {"function": {"name": "add", "arguments": '{"a": 4}'}}],
    }  # fmt: skip
    told = {"role": "tool", "tool_call_id": "000100000", "content": [{"type": "text", "text": "8"}]}
    body = {"messages": [*ASKED, echoed, told], "temperature": 0.5, "top_p": 1, "n": 1, "user": "me"}
    asked = read_request(body, WAY, ASKED, [*ASKED, drawn], None)
    assert asked == AgentRequest([told | {"content": "8", "name": "add"}], None, None, False)
    as_it_stands = read_request({"messages": ASKED}, WAY, ASKED, None, None)
    assert as_it_stands.messages is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("deaf", "takes no argument base_url and no api_key"),
        ("Class", "is no function"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_what_is_no_agent_is_refused_before_the_run(name: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"stages.grpo.agent: {HERE}:{name}: .*{problem}"):
        describe(TurnSettings(agent=f"{HERE}:{name}"), "stages.grpo")


def test_an_agent_that_asks_for_nothing_ends_the_run() -> None:
    with pytest.raises(RunFailure, match="returned without having asked for a turn"):
        agents("silent", env_on_error=0.0)

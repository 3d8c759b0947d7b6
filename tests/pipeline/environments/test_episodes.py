"""Conversations with environments, drawn in any order: the same samples, limits, rewards, faults."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from actors.batches import Generations, Said, trajectory_batch
from actors.batches.generations import FINISH_REASONS
from actors.errors import RunFailure, UserError
from pipeline.environments.episodes import turn_seed
from pipeline.environments.prepared import describe, parser_names
from pipeline.environments.spec import TurnSettings
from pipeline.rewards.user_functions import functions_closed
from tests.pipeline.environments.played import HERE, TOKENIZER, play, template_of_tools


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    with functions_closed():
        yield


def transcript(samples: Generations, number: int) -> str:
    return TOKENIZER.decode(samples.select([number]).token_ids.tolist())


def test_conversations_do_not_depend_on_the_order_in_which_turns_are_drawn() -> None:
    first = play(max_tool_calling_iterations=4)
    for order in (1, 2):
        again = play(order=order, max_tool_calling_iterations=4)
        assert again.episodes == first.episodes
        for name, values in first.arrays().items():
            assert np.array_equal(values, again.arrays()[name], equal_nan=values.dtype == np.float64), name
    assert first.episodes is not None
    assert len({one.turns for one in first.episodes}) > 1
    assert {one.ended for one in first.episodes} <= {"done", "turns"}
    assert max(one.turns for one in first.episodes) <= 5


def test_a_sample_is_its_prompt_the_turns_and_what_was_said_between_them() -> None:
    samples = play(lambda text, seed: "x", 2, max_tool_calling_iterations=1)
    assert transcript(samples, 0) == (
        "x<|im_end|>\n<|im_start|>user\nnot x<|im_end|>\n<|im_start|>assistant\nx<|im_end|>"
    )
    batch = trajectory_batch([one.prompt_ids for one in samples.episodes or ()], samples)
    assert batch.label_counts.tolist() == [4, 4]
    assert batch.token_columns["turn_rewards"].tolist() == [0.0] * 8
    (one, _) = samples.episodes or ()
    assert one.prompt_text.endswith("Which digit?<|im_end|>\n<|im_start|>assistant\n")  # Of its reset.
    assert [message["content"] for message in one.messages] == ["x", "not x", "x", "not x"]
    assert one.ended == "turns"


def test_each_turn_has_a_seed_of_its_own_and_the_first_one_that_of_the_sample() -> None:
    assert turn_seed(5, 0) == 5
    assert (
        len({turn_seed(5, turn) for turn in range(100)} | {turn_seed(6, turn) for turn in range(100)}) == 200
    )
    assert all(0 <= turn_seed(2**63 - 1, turn) < 2**63 for turn in range(100))


def test_samples_of_one_prompt_have_environments_of_one_seed() -> None:
    samples = play(lambda text, seed: next(d for d in "0123456789" if f"not {d}" not in text), samples=4)
    episodes = samples.episodes or ()
    assert {one.ended for one in episodes} == {"done"}
    secrets = [one.messages[-1]["content"] for one in episodes]
    assert secrets[0] == secrets[1]
    assert secrets[2] == secrets[3]


def test_a_conversation_ends_where_the_limit_of_tokens_leaves_no_room() -> None:
    samples = play(lambda text, seed: "x", 2, limit=120)
    assert {one.ended for one in samples.episodes or ()} == {"tokens"}
    assert set(samples.finish_reasons) == {"length"}
    assert (np.diff(samples.offsets) <= 120).all()
    assert samples.drawn_mask[samples.offsets[1:] - 1].all()
    cut = play(lambda text, seed: "x" * 500, 2, limit=120)
    assert np.diff(cut.offsets).tolist() == [120, 120]
    assert {FINISH_REASONS[i] for i in cut.finish} == {"length"}


def test_tools_answer_calls_and_a_turn_without_one_ends_the_conversation() -> None:
    def speak(text: str, seed: int) -> str:
        return "call 4" if "tool_response" not in text and "<|im_start|>tool" not in text else "done"

    def parse(text: str) -> Said:
        called = text.startswith("call")
        return Said("", [("increment", f'{{"step": {text[5:]}}}')]) if called else Said(text, [])

    with template_of_tools():
        samples = play(speak, 2, parse=parse, env=f"{HERE}:Counter", tool_parser="hermes")
    assert (
        transcript(samples, 0)
        == "call 4<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\ndone<|im_end|>"
    )
    one = (samples.episodes or ())[0]
    assert one.messages[0]["tool_calls"][0]["id"] == "000100000"
    assert '"increment"' in one.prompt_text
    assert "Guess. It is 3." in one.prompt_text
    assert np.nansum(samples.turn_rewards) == 14.0  # `get_reward` of both, at their ends.


@pytest.mark.parametrize("text", ["raise", "crash"])
def test_a_step_that_fails_ends_the_run_or_its_sample_with_the_reward_that_is_named(text: str) -> None:
    def speak(so_far: str, seed: int) -> str:
        return text if seed == 102 else "0"

    with pytest.raises(RunFailure, match=r"(?s)environment 'Guess'.*assistant: '" + text):
        play(speak, max_tool_calling_iterations=2)
    samples = play(speak, max_tool_calling_iterations=2, env_on_error=-1.0)
    assert [one.ended == "error" for one in samples.episodes or ()] == [i == 2 for i in range(6)]
    bad = samples.select([2])
    assert bad.turn_rewards is not None
    assert bad.turn_rewards[-1] == -1.0
    untouched = play(lambda text, seed: "0", max_tool_calling_iterations=2)
    kept = [0, 1, 3, 4, 5]
    assert samples.select(kept).token_ids.tolist() == untouched.select(kept).token_ids.tolist()


def test_what_can_not_converse_is_refused_before_the_run() -> None:
    with pytest.raises(UserError, match=r"stages.grpo.tool_parser: the policy calls tools"):
        describe(TurnSettings(env=f"{HERE}:Counter"), "stages.grpo")
    with pytest.raises(
        UserError, match=r"stages.grpo.tool_parser: 'hermez' is none of vLLM's parsers: .*hermes"
    ):
        describe(TurnSettings(tools=[f"{HERE}:add"], tool_parser="hermez"), "stages.grpo")
    with pytest.raises(UserError, match=r"stages.grpo.tools: .*has `step`"):
        describe(
            TurnSettings(env=f"{HERE}:Guess", tools=[f"{HERE}:add"], tool_parser="hermes"), "stages.grpo"
        )
    with pytest.raises(UserError, match=r"stages.grpo.env: nowhere:Env: it cannot be imported"):
        describe(TurnSettings(env="nowhere:Env"), "stages.grpo")
    assert {"hermes", "mistral", "llama3_json"} <= set(parser_names())

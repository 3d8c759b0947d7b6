"""Evaluations that play whole conversations: figures, rows, metric, and what tells two of them apart."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.batches import Generations, Said
from actors.errors import UserError
from pipeline.artifacts.weights import Weights
from pipeline.environments.spec import TurnSettings
from pipeline.evaluation.conversations import talk_figures, talk_rows
from pipeline.evaluation.held_out import EvalSet, eval_key, finished, read_eval_set
from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.scorers import find_scorer, score
from pipeline.evaluation.spec import EvalSpec
from pipeline.monitoring.progress import Progress
from pipeline.monitoring.summary import results_table
from pipeline.planning.length_rules import held_out_problems
from pipeline.rewards.user_functions import functions_closed
from pipeline.stages.specs.online import GrpoStage
from tests.pipeline.environments.played import HERE, PROMPT, TOKENIZER, play, template_of_tools

GUESS: dict[str, Any] = {"env": f"{HERE}:Guess", "max_tool_calling_iterations": 3}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    with functions_closed():
        yield


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [{"prompt": PROMPT, "answer": str(i)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "rows.jsonl")


def held_out(source: str, metric: str = "reward", turns: dict[str, Any] | None = GUESS) -> EvalSet:
    spec = EvalSpec(data=[{"source": source}], metric=metric)
    talks = None if turns is None else ("grpo", TurnSettings(**turns))
    return read_eval_set(spec, TOKENIZER, 0, turns=talks)


def scores(data: EvalSet, metric: str, made: Generations) -> list[float | None]:
    spec = EvalSpec(data=[{"source": "x"}], metric=metric)
    made = replace(made, n=1)
    samples = data.samples(made.texts(TOKENIZER), list(made.sequences()), made)
    return score(find_scorer(metric), spec, samples)


def test_reward_turns_and_calls_of_conversations_are_told_with_their_intervals(source: str) -> None:
    made = play(**GUESS)
    episodes = made.episodes or ()
    right = [one.ended == "done" for one in episodes]
    assert scores(held_out(source), "reward", made) == [float(one) for one in right]
    figures = talk_figures(made)
    assert figures["reward"] == {"mean": sum(right) / 6, "ci95": list(wilson(sum(right), 6))}
    assert figures["turns"] == sum(one.turns for one in episodes) / 6
    assert sum(figures["ended"].values()) == 6
    assert figures["called"]["mean"] == 0.0
    rows = talk_rows(made)
    assert [row["reward"] for row in rows] == [float(one) for one in right]
    assert rows[0]["messages"][0]["role"] == "assistant"


def test_a_conversation_that_calls_a_tool_counts_once(source: str) -> None:
    def speak(text: str, seed: int) -> str:
        return "call" if seed % 2 and text.count("assistant") < 3 else "done"

    def parse(text: str) -> Said:
        return Said("", [("add", '{"a": 1, "b": 2}')]) if text == "call" else Said(text, [])

    tools: dict[str, Any] = {"env": None, "tools": [f"{HERE}:add"], "tool_parser": "hermes"}
    with template_of_tools():
        made = play(speak, 4, parse=parse, **tools)
        with pytest.raises(UserError, match=r"eval\.metric: reward is what the environment gives"):
            held_out(source, turns=tools)
    assert talk_figures(made)["called"] == {"mean": 0.5, "ci95": list(wilson(2, 4))}
    assert "reward" not in talk_figures(made)


def test_exact_match_compares_what_the_policy_said_last(source: str) -> None:
    made = play(lambda text, seed: "x" if "not x" not in text else str(seed - 100), **GUESS)
    wanted = [float(one.messages[-1]["content"] == str(i)) for i, one in enumerate(made.episodes or ())]
    assert scores(held_out(source, "exact_match"), "exact_match", made) == wanted


def test_an_evaluation_that_converses_says_so_and_is_another_one(source: str) -> None:
    talking, single = held_out(source, "exact_match"), held_out(source, "exact_match", None)
    (line,) = talking.remarks()
    assert f"begins a conversation with {HERE}:Guess (stages.grpo), of 256 tokens at most" in line
    assert single.remarks() == []
    assert set(talking.code) == {f"{HERE}:Guess"}
    longer = held_out(source, "exact_match", GUESS | {"max_tool_calling_iterations": 4})
    slower = held_out(source, "exact_match", GUESS | {"env_timeout_s": 5.0})
    spec, weights = EvalSpec(data=[{"source": source}]), Weights("base", None, "f")
    keys = [eval_key(weights, one, spec, 0) for one in (single, talking, longer, slower)]
    assert len(set(keys)) == 3
    assert keys[1] == keys[3]


def test_a_whole_conversation_has_to_fit_into_an_engine(source: str) -> None:
    data = held_out(source)
    longest = max(map(len, data.data.token_ids))
    assert held_out_problems(data, longest + 256) == []
    (problem,) = held_out_problems(data, longest + 255)
    assert problem.startswith(f"eval.sampling.max_tokens: the longest prompt has {longest} tokens, with 256")


def test_prompts_of_plain_text_can_not_converse(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Guess."}\n')
    spec = EvalSpec(data=[{"source": str(tmp_path / "rows.jsonl"), "format": "text"}], metric="reward")
    with pytest.raises(UserError, match=r"eval\.data: the turns of stages\.grpo\.env are written by"):
        read_eval_set(spec, TOKENIZER, 0, turns=("grpo", TurnSettings(**GUESS)))


def test_what_an_environment_adds_at_its_reset_has_the_room_that_training_gives_it(source: str) -> None:
    data = held_out(source)
    assert data.talks is not None
    assert data.talks.room == max(map(len, data.data.token_ids))
    stage = GrpoStage(data=[{"source": source}], max_length=700, max_completion_length=100, **GUESS)
    spec = EvalSpec(data=[{"source": source}], metric="reward")
    talks = read_eval_set(spec, TOKENIZER, 0, turns=("grpo", stage)).talks
    assert talks is not None
    assert talks.room == 600


def test_damaged_figures_of_conversations_are_made_again(tmp_path: Path) -> None:
    figures = talk_figures(play(**GUESS))
    result = {"accuracy": 1.0, "n": 6, "ci95": [0.5, 1.0], "metric": "reward", "fingerprint": "k"}
    (tmp_path / "sft.jsonl").touch()
    for damage in ({}, {"turns": "two"}, {"called": 1}, {"reward": {"mean": None}}):
        made = result | {"conversations": figures | damage}
        (tmp_path / "sft.json").write_text(json.dumps(made))
        assert (finished(tmp_path, "sft", "k") is None) == bool(damage), damage
    said, state = io.StringIO(), {"stages": {}, "eval": {"sft": result | {"conversations": figures}}}
    results_table(Progress(Console(file=said, width=120)), state, ["sft"])
    assert "call a tool" in said.getvalue()

"""A metric is called as a reward function is, and tried before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.batches.generations import SamplingSpec
from actors.errors import RunFailure, UserError
from pipeline.data.reading.bad_rows import Skipped
from pipeline.data.reading.records import Records, load_records
from pipeline.data.tokens.prompts import PromptData
from pipeline.evaluation.held_out import EvalSet
from pipeline.evaluation.scorers import find_scorer, score, try_scorer
from pipeline.evaluation.spec import EvalSpec
from pipeline.rewards.user_functions import functions_closed

MODULE = """
import re, time
calls = 0

async def fine(prompts, completions, completion_ids, answer, **_):
    import numpy as np
    global calls
    calls += 1
    assert isinstance(prompts[0], list), prompts
    texts = [completion[-1]["content"] for completion in completions]
    return [np.float32(calls) if text == right else None for text, right in zip(texts, answer)]

def one_by_one(completions, **_):
    yield from (0.5 for _ in completions)

def nans(completions, **_):
    return [float("nan")] * len(completions)

def raises(prompts, completions, **_):
    return [text.strip() for text in completions]

def hangs(**_):
    re.match(r"^(a+)+$", "a" * 40 + "b")

def sometimes(completions, **_):
    return [1.0 if completion[-1]["content"] == "4" else 1e400 for completion in completions]
"""
QUESTION = [{"role": "user", "content": "2+2?"}]
EXPECTED = {
    "nans": "it returned nan for sample 0 of 2, and a reward or score is a finite number",
    "raises": "it raised AttributeError: 'list' object has no attribute 'strip'",
    "hangs": "no answer within 0.5 s for 2 samples",
}


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    (tmp_path / "metrics_of_mine.py").write_text(MODULE)
    rows = [{"prompt": QUESTION, "answer": "4"}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    with functions_closed():
        yield load_records(spec_of("fine").data, "prompt", seed=0)


def spec_of(name: str, timeout_s: float = 20) -> EvalSpec:
    return EvalSpec(data=[{"source": "rows.jsonl"}], metric=f"metrics_of_mine:{name}", timeout_s=timeout_s)


def scores(name: str, timeout_s: float = 20) -> list[float | None]:
    spec, columns = spec_of(name, timeout_s), {"answer": ["4", "4"]}
    data = PromptData([QUESTION] * 2, ["2+2?"] * 2, [[1]] * 2, columns, Skipped(), "")
    held_out = EvalSet(data, SamplingSpec())
    return score(find_scorer(spec.metric), spec, held_out.samples(["4", "5"], [[4], [5]]))


def test_what_is_fine_as_a_reward_is_fine_as_a_metric(records: Records) -> None:
    try_scorer(spec_of("fine"), records)
    assert scores("fine") == [1.0, None]  # The trial's call was in a process of its own.
    assert scores("fine") == [2.0, None]
    assert scores("one_by_one") == [0.5, 0.5]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_metric_that_fails_is_refused_before_the_run(records: Records, name: str) -> None:
    with pytest.raises(UserError) as raised:
        try_scorer(spec_of(name, 0.5 if name == "hangs" else 20), records)
    text = str(raised.value)
    assert text.startswith(f"eval.metric: metrics_of_mine:{name} can't score, tried with 2 of the rows: ")
    assert EXPECTED[name] in text
    assert "2+2?" in text


def test_a_metric_that_fails_on_what_a_model_said_ends_in_one_message_with_it(records: Records) -> None:
    try_scorer(spec_of("sometimes"), records)
    with pytest.raises(RunFailure) as raised:
        scores("sometimes")
    text = str(raised.value)
    assert "metric 'metrics_of_mine:sometimes' failed in phase 'score': it returned inf for sample 1" in text
    assert "'content': '5'" in text
    assert "trains nothing again" in text


def test_a_metric_has_a_deadline(records: Records) -> None:
    with pytest.raises(RunFailure, match=r"no answer within 0\.5 s"):
        scores("hangs", 0.5)


def test_a_metric_that_no_module_has_is_refused(records: Records) -> None:
    with pytest.raises(UserError, match=r"eval.metric: 'metrics_of_mine:none' cannot be imported"):
        try_scorer(spec_of("none"), records)

"""Reward functions: TRL's call, and one message (or a default) for whatever a function can do wrong."""

from __future__ import annotations

import ast
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actors.algorithms.reward_shaping import (
    combine,
    reward_metrics,
    without_eos_penalty,
    without_spread,
)
from actors.errors import RunFailure, UserError
from pipeline.rewards.functions import (
    Samples,
    call_reward_function,
    find_function,
    settled,
)
from pipeline.rewards.spec import RewardSpec, reward_names

SAMPLES = Samples(
    prompts=["1+1=", "1+1=", "2+2="],
    completions=["2", "three", "4"],
    completion_ids=[[50], [51, 52], [53]],
    columns={"answer": ["2", "2", "4"]},
)
STOP = RewardSpec(source="mine:score", timeout_s=20)


def function_rewards(
    spec: RewardSpec, function: Callable[..., Any], samples: Samples
) -> tuple[np.ndarray, str]:
    return settled(spec, call_reward_function(function, samples, spec.timeout_s), samples)


def spec(**settings: Any) -> RewardSpec:
    return STOP.model_copy(update=settings)


@pytest.mark.parametrize(
    ("source", "kind", "name"),
    [
        ("exact_match", "exact_match", "exact_match"),
        ("my_pkg.rewards:length", "function", "length"),
        ("reward", "model", "reward"),
        ("runs/demo/reward/adapter", "model", "reward"),
        ("/models/helpful", "model", "helpful"),
    ],
)
def test_a_source_says_what_it_is_and_has_a_name_for_metrics(source: str, kind: str, name: str) -> None:
    found = RewardSpec.model_validate(source)
    assert (found.kind, found.name, found.weight) == (kind, name, 1.0)


def test_sources_of_one_name_are_numbered() -> None:
    assert reward_names([RewardSpec(source=s) for s in ("a:f", "b:f", "c:g")]) == ["f", "f-2", "g"]


def test_a_default_that_is_no_number_is_refused() -> None:
    for wrong in ("skip", math.nan, math.inf):
        with pytest.raises(ValidationError):
            RewardSpec(source="a:f", on_error=wrong)


def test_a_function_is_called_as_trl_calls_it(tmp_path: Path) -> None:
    file = tmp_path / "seen"

    def score(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **rest: Any) -> list[float]:
        file.write_text(repr({"prompts": prompts, "completion_ids": completion_ids, "rest": rest}))
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    values, replaced = function_rewards(STOP, score, SAMPLES)
    assert values.tolist() == [1.0, 0.0, 1.0]
    assert replaced == ""
    seen = ast.literal_eval(file.read_text())
    assert seen == {"prompts": SAMPLES.prompts, "completion_ids": SAMPLES.completion_ids, "rest": {}}


def test_a_function_without_kwargs_gets_only_what_it_names() -> None:
    assert function_rewards(STOP, lambda completions: [len(c) for c in completions], SAMPLES)[0].tolist() == [
        1, 5, 1,
    ]  # fmt: skip


def test_none_means_that_a_function_does_not_apply_and_scalars_of_libraries_are_numbers() -> None:
    values, _ = function_rewards(STOP, lambda **_: [None, np.float32(0.5), torch.tensor(True)], SAMPLES)
    assert np.isnan(values[0])
    assert values[1:].tolist() == [0.5, 1.0]


async def later(completions: list[str], **_: Any) -> list[float]:
    import asyncio

    await asyncio.sleep(0)
    return [2.0] * len(completions)


def test_a_coroutine_function_is_awaited() -> None:
    assert function_rewards(STOP, later, SAMPLES)[0].tolist() == [2.0, 2.0, 2.0]


def raises_on_the_second(completions: list[str], **_: Any) -> list[float]:
    return [float(int(c)) for c in completions]


def exits(**_: Any) -> list[float]:
    raise SystemExit(3)


def hangs(**_: Any) -> list[float]:
    time.sleep(5)
    return [1.0] * 3


class Odd:
    """Neither a number nor anything that can be shown."""

    def __float__(self) -> float:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError


NAN = math.nan
FAULTS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "raises": (raises_on_the_second, "it raised ValueError: invalid literal", "'three'"),
    "leaves the program": (exits, "it raised SystemExit: 3", "'2'"),
    "too few values": (lambda **_: [1.0], "it returned 1 values for 3 samples", "'2'"),
    "no list": (lambda **_: 1.0, "it returned float, not a list", "'2'"),
    "nothing": (lambda **_: None, "it returned NoneType, not a list", "'2'"),
    "NaN": (lambda **_: [1.0, math.nan, 0.0], "it returned nan for sample 1 of 3", "'three'"),
    "infinity": (lambda **_: [1.0, 0.0, math.inf], "it returned inf for sample 2 of 3", "'4'"),
    "a text": (lambda **_: [1.0, "2", 0.0], "it returned '2' for sample 1 of 3", "'three'"),
    "a list of lists": (lambda **_: [[1.0], [1.0], [1.0]], r"it returned [1.0] for sample 0", "'2'"),
    "an array of NaN": (lambda **_: np.array([1.0, 2.0, NAN]), "nan) for sample 2 of 3, and a reward", "'4'"),
    "minus infinity of numpy": (lambda **_: [np.float32("-inf"), 1, 1], "-inf) for sample 0", "'2'"),
    "an integer beyond every float": (lambda **_: [1, 10**400, 0], "it returned 1000", "'three'"),
    "a number that can't be printed": (lambda **_: [1, 10**5000, 0], "a value of type int", "'three'"),
    "a class of one's own": (lambda **_: [1.0, Odd(), 0], "a value of type Odd for sample 1", "'three'"),
    "a complex number": (lambda **_: [1.0, 1j, 0], "it returned 1j for sample 1", "'three'"),
    "a list with nothing in it": (lambda **_: [1.0, [], 0], "it returned [] for sample 1", "'three'"),
    "a mapping": (lambda **_: {0: 1.0, 1: 1.0, 2: 1.0}, "it returned dict, not a list", "'2'"),
    "a set": (lambda **_: {1.0, 2.0, 3.0}, "it returned set, not a list", "'2'"),
    "one text": (lambda **_: "123", "it returned str, not a list", "'2'"),
    "a generator that raises": (lambda completions: (float(c) for c in completions), "ValueError", "'three'"),
    "a generator that hangs": (lambda **_: (hangs()[i] for i in range(3)), "no answer within 0.2 s", "'2'"),
    "too slow": (hangs, "no answer within 0.2 s for 3 samples", "'2'"),
    "a wrong signature": (lambda words: [1.0] * 3, "it raised TypeError", "'2'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_one_message_with_the_sample(fault: str) -> None:
    function, reason, sample = FAULTS[fault]
    limit = 0.2 if "within 0.2 s" in reason else 20
    with pytest.raises(RunFailure) as raised:
        function_rewards(spec(timeout_s=limit), function, SAMPLES)
    text = str(raised.value)
    assert text.startswith("reward 'score' failed in phase 'rewards'")
    assert reason in text
    assert f"completion: {sample}" in text
    assert "answer: " in text
    assert "on_error" in text


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("raises", [-1, -1, -1]),
        ("too few values", [-1, -1, -1]),
        ("too slow", [-1, -1, -1]),
        ("NaN", [1, -1, 0]),
    ],
)
def test_a_configured_default_stands_in_for_the_samples_concerned(fault: str, expected: list[float]) -> None:
    function, reason, _ = FAULTS[fault]
    limit = 0.2 if "within 0.2 s" in reason else 20
    values, replaced = function_rewards(spec(timeout_s=limit, on_error=-1.0), function, SAMPLES)
    assert values.tolist() == expected
    assert reason in replaced
    assert f"{expected.count(-1)} of 3 samples get -1" in replaced


@pytest.mark.parametrize("guilty", [0, 1, 5, 99, 255])
def test_the_guilty_sample_is_found_in_few_calls(guilty: int, tmp_path: Path) -> None:
    asked = tmp_path / "asked"

    def fails(completions: list[str], **_: Any) -> list[float]:
        with asked.open("a") as file:
            file.write(f"{len(completions)}\n")
        if str(guilty) in completions:
            raise ValueError(f"no {guilty}")
        return [1.0] * len(completions)

    texts = [str(number) for number in range(256)]
    found = call_reward_function(fails, Samples(texts, texts, [[1]] * 256), 20)
    assert (found.bad[0], len(found.bad)) == (guilty, 256)
    assert found.problem == f"it raised ValueError: no {guilty}"
    assert (
        2 <= len(asked.read_text().split()) <= 11
    )  # the call itself, one alone, eight halves, and the found one


def test_a_judge_out_of_reach_is_asked_once_more_and_one_that_refuses_so_many_few_times(
    tmp_path: Path,
) -> None:
    asked = tmp_path / "asked"

    def judge(completions: list[str], most: int) -> list[float]:
        with asked.open("a") as file:
            file.write(f"{len(completions)}\n")
        if len(completions) > most:
            raise ConnectionError("refused")
        return [1.0] * len(completions)

    texts = ["a"] * 256
    for most, calls in ((0, 2), (200, 11)):
        asked.write_text("")
        found = call_reward_function(partial(judge, most=most), Samples(texts, texts, [[1]] * 256), 20)
        assert (found.problem, found.bad[0]) == ("it raised ConnectionError: refused", 0)
        assert 2 <= len(asked.read_text().split()) <= calls


def test_the_deadline_holds_while_a_function_sleeps() -> None:
    begun = time.monotonic()
    assert call_reward_function(hangs, SAMPLES, 0.2).problem
    assert time.monotonic() - begun < 2


def test_long_texts_are_cut_in_messages() -> None:
    long = Samples(["p" * 5000], ["c"], [[1]])
    with pytest.raises(RunFailure) as raised:
        function_rewards(STOP, lambda **_: [math.nan], long)
    assert len(str(raised.value)) < 1000
    assert "5002 characters" in str(raised.value)


def test_functions_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_here.py").write_text("def one(**_):\n    return [1.0]\nTWO = 2\n")
    (tmp_path / "broken_rewards_here.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    one = Samples(["q"], ["a"], [[1]])
    assert function_rewards(STOP, find_function("my_rewards_here:one"), one)[0].tolist() == [1.0]
    assert "my_rewards_here" not in sys.modules
    for wrong, reason in (
        ("my_rewards_here:three", "AttributeError"),
        ("my_rewards_here:TWO", "not a function but of type int"),
        ("no_such_module_here:f", "ModuleNotFoundError"),
        ("broken_rewards_here:f", "ZeroDivisionError"),
    ):
        with pytest.raises(UserError, match=reason):
            find_function(wrong)


@pytest.mark.parametrize("wrong", ["pipeline.mine:f", "actors.rewards:f", "pipeline.rewards:f"])
def test_a_module_in_a_package_named_as_one_of_ours_is_told_what_to_do(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = wrong.partition(".")[0]
    (tmp_path / package).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_function(wrong)
    assert f"`{package}` is a package of Raylign" in str(caught.value)
    assert f"({package}): rename yours" in str(caught.value)


TWO_SOURCES = np.array([[1.0, 0.0, NAN, NAN], [2.0, NAN, 4.0, NAN]])


def test_rewards_add_up_by_weight_without_those_that_do_not_apply() -> None:
    assert combine(TWO_SOURCES, [1.0, 0.5]) == pytest.approx([2.0, 0.0, 2.0, NAN], nan_ok=True)


def test_metrics_have_trls_names_and_unbiased_deviations() -> None:
    found = reward_metrics(["a", "b"], TWO_SOURCES, [1.0, 0.5], num_generations=2)
    assert found == pytest.approx(
        {
            "rewards/a/mean": 0.5, "rewards/a/std": 0.5**0.5, "rewards/b/mean": 3.0, "rewards/b/std": 2**0.5,
            "reward": 4 / 3, "reward_std": (4 / 3) ** 0.5, "frac_reward_zero_std": 0.0,
        }
    )  # fmt: skip
    even = reward_metrics(["a"], np.array([[1.0, 1.0, 0.0, 1.0]]), [1.0], num_generations=2)
    assert even["frac_reward_zero_std"] == 0.5


def test_a_source_without_any_value_has_no_metric() -> None:
    assert "rewards/a/mean" not in reward_metrics(["a"], np.full((1, 2), NAN), [1.0], 2)


@pytest.mark.parametrize("nobody", [[1.0, 0.0], [0.0, 0.0]])
def test_a_source_of_weight_0_scores_no_sample(nobody: list[float]) -> None:
    watched = np.array([[1.0, NAN, NAN], [5.0, 6.0, NAN]])
    first = 1.0 if any(nobody) else NAN
    assert combine(watched, nobody) == pytest.approx([first, NAN, NAN], nan_ok=True)


def test_equal_rewards_of_any_size_have_no_spread() -> None:
    rewards = np.array([0.1] * 3 + [1e9 + 0.1] * 3 + [1e9, 1e9 + 1, 1e9])
    assert without_spread(rewards, 3).tolist() == [True, True, False]
    found = reward_metrics(["a"], rewards[None], [1.0], 3)
    assert found["frac_reward_zero_std"] == pytest.approx(2 / 3)


def test_the_penalty_hits_samples_that_were_cut() -> None:
    rewards, finished = np.array([1.0, 1.0, NAN]), np.array([True, False, False])
    assert without_eos_penalty(rewards, finished, 0.5) == pytest.approx([1.0, 0.5, NAN], nan_ok=True)
    assert without_eos_penalty(rewards, finished, None) is rewards

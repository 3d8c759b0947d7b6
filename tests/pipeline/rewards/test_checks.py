"""Rewards that check answers: tests of code within limits, and mathematical equality."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import time
from typing import Any

import pytest

from actors.errors import UserError
from pipeline.rewards import code_tests
from pipeline.rewards.code_tests import code_of, run_tests, score_of
from pipeline.rewards.functions import Samples
from pipeline.rewards.kept_answers import KeptAnswers
from pipeline.rewards.math_answers import in_dollars
from pipeline.rewards.sources import source_of
from pipeline.rewards.spec import CodeReward, MathReward

RIGHT = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add('a', 'b') == 'ab'"]
NAMESPACES = (
    subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True, check=False).returncode == 0
)


def passed(code: str, seconds: float = 10, tests: list[str] = TESTS) -> list[bool]:
    return run_tests(code, tests, seconds, 512, 8)


def test_each_test_passes_or_fails_by_itself() -> None:
    assert passed(RIGHT) == [True, False, True]


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "print('passed 0')\n(",
        "x = bytearray(1 << 31)\n" + RIGHT,
    ],
    ids=["exits", "says it is done", "prints and is no Python", "takes too much memory"],
)
def test_code_that_ends_early_or_breaks_its_limits_passes_nothing(code: str) -> None:
    assert passed(code) == [False, False, False]


def test_code_that_hangs_has_its_seconds_and_what_it_started_ends_with_it() -> None:
    mark = f"77{os.getpid()}"
    sleeps = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)\n"
    began = time.monotonic()
    assert passed(RIGHT, 3, [TESTS[0], "while True: pass"]) == [True, False]
    assert time.monotonic() - began < 15
    assert passed(sleeps + RIGHT) == [True, False, True]
    found = subprocess.run(["pgrep", "-f", f"sleep {mark}"], capture_output=True, text=True, check=False)
    assert found.stdout == ""


@pytest.mark.skipif(not NAMESPACES, reason="this kernel has no user namespaces for it")
def test_code_has_no_network() -> None:
    listens = "import socket\nhere = socket.create_server(('127.0.0.1', 0))\n"
    assert passed(listens, tests=["socket.create_connection(here.getsockname(), 2)"]) == [False]


def test_the_last_block_is_the_code_and_all_of_the_text_where_there_is_none() -> None:
    assert code_of("First\n```python\nx = 1\n```\nbetter:\n```py\nx = 2\n```\n") == "x = 2\n"
    assert code_of("x = 3") == "x = 3"
    assert code_of("```python\nx = 4") == "x = 4"
    assert [score_of([True, False], how) for how in ("share", "all")] == [0.5, 0.0]
    with pytest.raises(TypeError, match="a text or a list of texts"):
        code_tests.tests_of({"a": 1})


def test_code_is_a_reward_in_a_process_of_its_own() -> None:
    chat = [{"role": "assistant", "content": f"Here:\n```python\n{RIGHT}\n```"}]
    samples = Samples(["q"] * 2, [chat, chat], [[1]] * 2, {"tests": [TESTS[:2], None]})
    found = source_of(CodeReward(), KeptAnswers(None)).begin(samples)()
    assert (found.values, found.problem) == ([0.5, None], "")


def test_a_bare_formula_is_put_in_dollars_and_a_text_is_not() -> None:
    assert in_dollars(r"2\sqrt{2}") == r"$2\sqrt{2}$"
    assert in_dollars(r"It is \boxed{2}") == r"It is \boxed{2}"


def test_math_compares_values_or_says_how_to_install_it() -> None:
    if importlib.util.find_spec("math_verify") is None:
        with pytest.raises(UserError, match="pip install 'math-verify"):
            source_of(MathReward(), KeptAnswers(None))
        return
    answers: dict[str, Any] = {"answer": [r"\frac{1}{3}", "5", None]}
    samples = Samples(["q"] * 3, [r"\boxed{\frac{2}{6}}", "6", "7"], [[1]] * 3, answers)
    assert source_of(MathReward(), KeptAnswers(None)).begin(samples)().values == [1.0, 0.0, None]

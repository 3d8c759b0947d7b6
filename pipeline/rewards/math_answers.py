"""Mathematical equality of a completion's answer with the right one, by math-verify.

A reward function, in a process of reward functions: math-verify takes its own time limits from an alarm in
the main thread, and a formula that hangs it anyway ends with that process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

WORD = re.compile(r"\$|\\boxed|(?<![\\A-Za-z])[A-Za-z]{2,}")
"""Signs that an answer is a text around a formula, and no formula by itself."""

MISSING = "math-verify is not installed: pip install 'math-verify[antlr4_13_2]'"


def math_rewards(completions: Sequence[Any], right: Sequence[Any]) -> list[float | None]:
    """1.0 where a completion's answer equals the right one, else 0.0; None where the row has none that can be
    read.

    The right answer may be a number, an expression, LaTeX with or without dollars, or a whole solution
    with its answer boxed. The completion's is the last that math-verify finds, a boxed one first.
    """
    from math_verify import parse, verify

    found: list[float | None] = []
    for completion, answer in zip(completions, right, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        gold = None if answer is None else parse(in_dollars(str(answer))) or parse(str(answer))
        found.append(float(verify(gold, parse(text))) if gold else None)
    return found


def in_dollars(answer: str) -> str:
    """A bare formula as LaTeX: without dollars math-verify would read the 2 of `2\\sqrt{2}`."""
    return answer if WORD.search(answer) else f"${answer}$"


def installed() -> bool:
    """True where math-verify can be imported."""
    import importlib.util

    return importlib.util.find_spec("math_verify") is not None

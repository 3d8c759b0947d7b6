"""Functions for GSM8K, as examples of `eval.metric: module:function` and of an online stage's `rewards`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_MARKED = re.compile(r"####\s*(-?[\d,]+(?:\.\d+)?)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_answer(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """1.0 where a completion ends in the number after `####` of the row's `answer`, else 0.0.

    A completion without `####` is judged by its last number. The signature is that of TRL's reward functions:
    further columns of the rows arrive as keyword arguments.
    """
    return [
        float(_number(completion) is not None and _number(completion) == _number(right))
        for completion, right in zip(completions, answer, strict=True)
    ]


def marked(completions: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where a completion ends in one line `#### NUMBER`, as GSM8K's own solutions do, else 0.0."""
    return [
        float(
            len(_MARKED.findall(text)) == 1 and _MARKED.match(text.rstrip().rsplit("\n", 1)[-1]) is not None
        )
        for text in completions
    ]


def _number(text: str) -> float | None:
    found = _MARKED.findall(text) or _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None

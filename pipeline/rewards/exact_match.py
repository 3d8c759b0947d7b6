"""Reward and metric of the builtin arithmetic data: 1 where the completion is the row's answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[str | list[dict[str, str]]],
    answer: Sequence[str],
    **columns: Any,
) -> list[float]:
    """1.0 where a completion, stripped, is the answer, else 0.0. A reward function in TRL's form:
    completions are strings or message lists, further columns are ignored."""
    texts = [c if isinstance(c, str) else _last_answer(c) for c in completions]
    return [float(text.strip() == str(right).strip()) for text, right in zip(texts, answer, strict=True)]


def _last_answer(messages: list[dict[str, str]]) -> str:
    """What the policy said last; an environment may have answered it."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")

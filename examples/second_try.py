"""An environment of several turns: a sum is asked, and a wrong answer gets a hint and another try.

raylign run examples/second-try.yaml
"""

from __future__ import annotations

from typing import Any

TRIES = 3


class SecondTry:
    """Asks for a number until it is right, or for the third time. What comes later is worth less."""

    def __init__(self, row: dict[str, Any], seed: int) -> None:
        """`row`: with the question's `answer`; `seed`: for environments that draw something of their own."""
        self.answer = int(row["answer"])
        self.tries = 0

    def reset(self) -> None:
        """The conversation begins with the row's prompt as it stands."""

    def step(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, str]], float, bool]:
        """Messages, reward, done: the answer to a conversation that ends with the policy's turn."""
        self.tries += 1
        said = _number(messages[-1]["content"])
        if said == self.answer:
            return [], 1.0 / self.tries, True
        if self.tries == TRIES:
            return [], 0.0, True
        hint = "" if said is None else "More. " if said < self.answer else "Less. "
        return [{"role": "user", "content": hint + messages[0]["content"]}], 0.0, False


def first_right(completions: list[list[dict[str, str]]], answer: list[str], **columns: Any) -> list[float]:
    """1.0 where the first turn is right, as the policy is without a hint. A reward function of weight 0."""
    return [
        float(_number(messages[0]["content"]) == int(right))
        for messages, right in zip(completions, answer, strict=True)
    ]


def _number(text: str) -> int | None:
    try:
        return int(text.strip())
    except ValueError:
        return None

"""Environments and tools of the tests."""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any


class Guess:
    """Guess a number: the general form."""

    def __init__(self, row: dict[str, Any], seed: int) -> None:
        self.secret, self.asked = random.Random(seed).randrange(10), row

    def reset(self, row: dict[str, Any]) -> list[dict[str, str]]:
        return [*row["prompt"], {"role": "user", "content": "Which digit?"}]

    def step(self, messages: list[dict[str, Any]]) -> tuple[Any, float, bool]:
        said = messages[-1]["content"].strip()
        if said == "crash":
            os._exit(3)
        if said == "hang":
            time.sleep(60)
        if said == "raise":
            raise ValueError("a fault")
        if said == "forever":
            return "again", 0.0, False
        right = said == str(self.secret)
        return [] if right else [{"role": "user", "content": f"not {said}"}], float(right), right


class Slow:
    """Thinks a tenth of a second, while others think too."""

    async def reset(self) -> None:
        await asyncio.sleep(0.1)

    async def step(self, messages: list[dict[str, Any]]) -> tuple[Any, float, bool]:
        if messages[-1]["content"] == "hang":
            await asyncio.sleep(60)
        await asyncio.sleep(0.1)
        return [{"role": "user", "content": "go on"}], 0.5, False


class Fickle(Guess):
    """Doesn't follow from its seed."""

    def step(self, messages: list[dict[str, Any]]) -> tuple[Any, float, bool]:
        said = super().step(messages)
        return f"at {time.time()}", said[1], False


class Counter:
    """TRL's form: its methods are tools, and it scores itself."""

    def reset(self, start: int = 0, **row: Any) -> str:
        self.count = start
        return f" It is {start}."

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return float(self.count)


class NotOne:
    """Neither form."""

    def reset(self) -> None: ...


def add(a: float, b: float) -> float:
    """
    Add two numbers.

    Args:
        a: The first one.
        b: The other one.
    """
    return a + b


def undocumented(a: float) -> float:
    return a

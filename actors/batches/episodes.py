"""One sample as a conversation with an environment: it grows by turns of the engine and by what the
environment says, token id by token id. Pure.

Ids are only ever appended: those that the engine drew stand in the sample as the engine sent them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Episode:
    """Facts of a sample's conversation beside its tokens; JSON can hold all of it."""

    prompt_ids: list[int]
    """The prompt as the engine read it, with what the environment said at its reset."""
    prompt_text: str
    prompt: list[dict[str, Any]]
    """The same as messages."""
    messages: list[dict[str, Any]]
    """All messages behind it, the environment's last ones included."""
    turns: int
    """Of the engine."""
    ended: str
    """`done` (by the environment), `turns` or `tokens` (a limit), or `error` (a step failed)."""


@dataclass
class GrowingSample:
    """Tokens of a sample behind its prompt, and what is known of each."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    finish: int = 0
    """Of the last turn: index into `FINISH_REASONS`."""
    experts: list[np.ndarray] = field(default_factory=list)
    """(positions, layers, top_k) of each turn: of those positions that no turn before it computed."""
    turns: int = 0

    @property
    def context(self) -> list[int]:
        """All tokens so far: what the next turn is drawn from."""
        return self.prompt_ids + self.token_ids

    def drew(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        versions: Sequence[int],
        finish: int,
        experts: np.ndarray | None = None,
    ) -> None:
        """Append a turn of the engine. `experts`: of all positions that it computed, (positions, layers,
        top_k), from the first of the prompt on."""
        if experts is not None:
            self.experts.append(experts[sum(map(len, self.experts)) :])
        self.token_ids += map(int, token_ids)
        self.logprobs += map(float, logprobs)
        self.versions += map(int, versions)
        self.drawn += [True] * len(token_ids)
        self.rewards += [np.nan] * len(token_ids)
        self.finish, self.turns = finish, self.turns + 1

    def said(self, token_ids: Sequence[int]) -> None:
        """Append what the environment said, with the head of the next answer."""
        self.token_ids += map(int, token_ids)
        self.logprobs += [0.0] * len(token_ids)
        self.versions += [self.versions[-1]] * len(token_ids)
        self.drawn += [False] * len(token_ids)
        self.rewards += [np.nan] * len(token_ids)

    def earned(self, reward: float) -> None:
        """Note the environment's reward for the last turn."""
        self.rewards[-1] = reward

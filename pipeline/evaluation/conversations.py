"""Figures and rows of an evaluation whose samples are conversations with an environment or tools. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.evaluation.intervals import mean_with_interval

if TYPE_CHECKING:
    from actors.batches import Generations
    from pipeline.environments.spec import TurnSettings

ENV_REWARD = "env_reward"
"""Column that metrics get beside those of the data: what the environment gave each conversation, or None."""


def env_reward(env_reward: Sequence[float | None], **columns: Any) -> list[float | None]:
    """The rewards that environments gave: the metric `reward`. A reward function in TRL's form."""
    return list(env_reward)


def identity_of(spec: TurnSettings) -> dict[str, Any]:
    """Settings that conversations depend on, beside the code."""
    return {name: getattr(spec, name) for name in TURN_KEYS}


TURN_KEYS = ("env", "agent", "tools", "tool_parser", "max_tool_calling_iterations", "env_on_error")


def rewards_of(made: Generations) -> list[float | None]:
    """Reward of each conversation, None where its environment gave none."""
    earned = made.earned
    values = [None] * len(made.finish) if earned is None else earned.tolist()
    return [None if value is None or np.isnan(value) else value for value in values]


def talk_rows(made: Generations) -> list[dict[str, Any]]:
    """Columns of written rows that conversations have: messages, reward, turns, end. Of single turns none."""
    if made.episodes is None:
        return [{} for _ in made.finish]
    return [
        {"messages": one.messages, "reward": reward, "turns": one.turns, "ended": one.ended}
        for one, reward in zip(made.episodes, rewards_of(made), strict=True)
    ]


def talk_figures(made: Generations) -> dict[str, Any]:
    """Figures of all conversations: mean reward (left out where there is none) and share that calls a tool,
    each with its 95 % interval, mean turns, and how many ended how."""
    episodes = made.episodes or ()
    called = [any(message.get("tool_calls") for message in one.messages) for one in episodes]
    rewards = [reward for reward in rewards_of(made) if reward is not None]
    found: dict[str, Sequence[float]] = {"called": called} | ({"reward": rewards} if rewards else {})
    figures: dict[str, Any] = {
        "turns": float(np.mean([one.turns for one in episodes])),
        "ended": dict(sorted(Counter(one.ended for one in episodes).items())),
    }
    for name, values in found.items():
        mean, low, high = mean_with_interval([float(value) for value in values])
        figures[name] = {"mean": mean, "ci95": [low, high]}
    return figures


def is_whole_talk(figures: Any) -> bool:
    """True for `talk_figures` that are all there, and for None."""
    if figures is None:
        return True
    if not isinstance(figures, dict) or type(figures.get("turns")) not in (int, float):
        return False
    shown = [figures.get("called"), *([figures["reward"]] if "reward" in figures else [])]
    return all(isinstance(one, dict) and type(one.get("mean")) in (int, float) for one in shown)

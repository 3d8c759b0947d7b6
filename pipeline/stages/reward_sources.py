"""Sources of reward as the configuration names them, looked up before anything is started."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from actors.errors import UserError
from actors.rewards import RewardSpec, find_function
from pipeline.stages.spec import RlStage

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig


def reward_source_problems(config: RunConfig, names: Iterable[str]) -> list[str]:
    """What is wrong with the functions and directories that the named online stages are rewarded by."""
    problems = []
    for name in names:
        stage = config.stages[name]
        if isinstance(stage, RlStage):
            for position, reward in enumerate(stage.rewards):
                found = _problems(reward, config)
                problems += [f"stages.{name}.rewards.{position}: {problem}" for problem in found]
    return problems


def _problems(reward: RewardSpec, config: RunConfig) -> list[str]:
    try:
        if reward.kind == "function":
            find_function(reward.source)
        elif reward.kind == "model" and reward.source not in config.stages:
            _check_reward_model(Path(reward.source))
    except UserError as error:
        return [problem.removeprefix("rewards: ") for problem in error.problems]
    return []


def _check_reward_model(directory: Path) -> None:
    """Refuse a directory that holds no adapter with a score head."""
    from actors.models.adapters import read_head

    if not (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds no reward model (adapter_config.json is missing); name the `adapter` "
            "directory of a finished reward stage"
        )
    if read_head(directory) is None:
        raise UserError(
            f"{directory} is a policy's adapter: it has no score head, so it can't reward anything"
        )

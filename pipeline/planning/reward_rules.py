"""Sources of reward as the configuration names them, looked up before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import UserError
from pipeline.environments.processes import kept_environment
from pipeline.rewards.functions import ARGUMENTS, Samples, find_function
from pipeline.rewards.kept_answers import KeptAnswers
from pipeline.rewards.sources import source_of
from pipeline.rewards.spec import EXACT_MATCH, JudgeReward, RewardSettings, RewardSpec, ServiceSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from actors.models.base.loading import ResolvedBase
    from pipeline.config.run_config import RunConfig
    from pipeline.stages.specs.registry import AnyStage


def function_sources(config: RunConfig, names: Iterable[str]) -> list[str]:
    """The user's functions that the named online stages are rewarded by."""
    stages = [config.stages[name] for name in names]
    return [
        one.function for stage in stages if stage.online for one in stage.rewards if one.function is not None
    ]


def start_environments(config: RunConfig, names: Iterable[str]) -> None:
    """Start the processes of the named online stages' environments and tools, which import their modules
    while this process goes on."""
    for name in names:
        stage = config.stages[name]
        if stage.online and stage.converses:
            kept_environment(stage.env, stage.tools, stage.env_timeout_s, stage.agent)


def reward_source_problems(config: RunConfig, names: Iterable[str]) -> list[str]:
    """Problems of the functions and directories that the named online stages are rewarded by."""
    problems = []
    for name in names:
        stage = config.stages[name]
        if stage.online:
            for position, reward in enumerate(stage.rewards):
                found = _problems(reward, config)
                problems += [f"stages.{name}.rewards.{position}: {problem}" for problem in found]
    return problems


def reward_column_problems(
    name: str, stage: AnyStage, columns: Mapping[str, Sequence[Any]], rows: int
) -> list[str]:
    """Problems of columns that a stage's rewards ask for and its data lack.

    Args:
        columns: of the data, beside the prompt; one value a row, None where a row lacks it.
    """
    if not stage.online:
        return []
    problems = []
    for position, reward in enumerate(stage.rewards):
        problem = _column_problem(reward, columns, rows)
        problems += [f"stages.{name}.rewards.{position}: {problem}"] if problem else []
    return problems


def _column_problem(reward: RewardSettings, columns: Mapping[str, Sequence[Any]], rows: int) -> str:
    there = f"columns beside the prompt: {', '.join(columns) or 'none'}"
    if isinstance(reward, RewardSpec) and reward.source == EXACT_MATCH:
        lack = rows - sum(value is not None for value in columns.get("answer", []))
        which = "the rows" if lack == rows else f"{lack} of {rows} rows"
        instead = "name it under `columns:` of the data, or reward by a function or a model"
        return f"exact_match compares with `answer`, which {which} lack ({there}); {instead}" if lack else ""
    try:
        if reward.function is not None:
            missing = find_function(reward.function).missing([*ARGUMENTS, *columns])
        else:
            wanted = _template_columns(reward) if isinstance(reward, JudgeReward) else reward.columns_needed
            missing = [name for name in wanted if name not in columns]
    except UserError:  # `reward_source_problems` tells of it.
        return ""
    if not missing:
        return ""
    named = ", `columns: {answer: ...}` names one" if "answer" in missing else ""
    default = ", or give the argument a default" if reward.function is not None else ""
    return (
        f"{reward.says} asks for {', '.join(missing)}, which the data do not have ({there}); add such a "
        f"column{named}{default}"
    )


def _template_columns(judge: JudgeReward) -> Sequence[str]:
    from pipeline.rewards.services import template_columns

    return template_columns(judge)


def service_problems(name: str, stage: AnyStage, asked: Callable[[], Samples]) -> list[str]:
    """Problems of services that a stage is rewarded by, each asked about a few samples.

    Args:
        asked: makes the samples; called only where there are services.
    """
    problems: list[str] = []
    for position, reward in enumerate(stage.rewards if stage.online else []):
        if not isinstance(reward, ServiceSettings) or reward.url_asked is None:
            continue
        where = f"stages.{name}.rewards.{position}"
        try:
            source = source_of(reward, KeptAnswers(None))
        except UserError:  # `reward_source_problems` tells of it.
            continue
        samples = asked()
        if (called := source.begin(samples)()).problem:
            shown = samples.shown(called.bad[0])
            problems.append(f"{where}: asked about {len(samples)} samples: {called.problem}\n{shown}")
    return problems


def reward_base_problems(
    config: RunConfig, names: Iterable[str], base: ResolvedBase | None = None
) -> list[str]:
    """Problems of the named stages' directories of reward models with the run's base, which is
    looked at here where it wasn't before and there are any."""
    if not any(config.reward_models_of(name) for name in names):
        return []
    from actors.models.base.loading import resolve_base
    from actors.models.lora.adapters import check_adapter_matches_base, quantization_problems

    base = base or resolve_base(config.model)
    if base.config is None:
        return []
    local = base.base_path if Path(base.base_path).is_dir() else None
    problems = []
    for name in names:
        stage = config.stages[name]
        for position, reward in enumerate(stage.rewards if stage.online else []):
            directory = reward.reward_model
            if directory is not None and directory not in config.stages and not _problems(reward, config):
                found = check_adapter_matches_base(directory, base.config, local)
                found = found or quantization_problems(directory, config.model.quantization)
                found = found or _target_problems(config, directory, base.config)
                problems += [f"stages.{name}.rewards.{position}: {problem}" for problem in found]
    return problems


def _target_problems(config: RunConfig, directory: str, base: PretrainedConfig) -> list[str]:
    """PEFT wants the same experts and router targets in all adapters on one base."""
    from actors.models.lora.adapters import saved_config
    from actors.models.lora.targets import resolve_targets

    lora = config.model.lora
    if lora is None or config.roles.reward.share is None:
        return []
    try:
        mine = set(resolve_targets(base, lora.targets, lora).target_parameters)
    except UserError:  # Told of under model.lora.targets.
        return []
    its = set(saved_config(directory).target_parameters or [])
    if not mine or not its or mine == its:
        return []
    return [
        f"adapter '{directory}' adapts {', '.join(sorted(its))}, the policy {', '.join(sorted(mine))}: on "
        "one base these must be the same; take the same model.lora.targets, or give the reward models "
        "processes of their own (roles.reward: {workers: 1})"
    ]


def _problems(reward: RewardSettings, config: RunConfig) -> list[str]:
    try:
        if reward.judge_model is not None:
            _check_judge(reward.judge_model, config)
        if reward.reward_model is None:
            source_of(reward, KeptAnswers(None))
        elif reward.reward_model not in config.stages:
            _check_reward_model(Path(reward.reward_model))
    except UserError as error:
        return [problem.removeprefix("rewards: ") for problem in error.problems]
    return []


def _check_judge(model: str, config: RunConfig) -> None:
    """Refuse a judge that no engine could serve."""
    from actors.models.base.loading import load_tokenizer, resolve_base

    spec = config.judge_settings(model)
    try:
        resolve_base(spec).checked()
        load_tokenizer(spec)
    except UserError as error:
        found = [problem.removeprefix("model.base: ") for problem in error.problems]
        raise UserError([f"model: {problem}" for problem in found]) from None


def _check_reward_model(directory: Path) -> None:
    """Refuse a directory that holds no adapter with a score head."""
    from actors.models.base.loading import no_such_directory
    from actors.models.facts import saved_head

    if not os.path.isdir(directory):
        raise UserError(no_such_directory(str(directory)))
    if not (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds no reward model (adapter_config.json is missing); name the `adapter` "
            "directory of a finished reward stage"
        )
    if saved_head(directory) is None:
        raise UserError(
            f"{directory} is a policy's adapter: it has no score head, so it can't reward anything"
        )

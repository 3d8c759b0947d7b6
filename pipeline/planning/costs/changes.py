"""Changes of a config by which a run would fit, the least intrusive first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actors.models.spec import LoraSpec
from pipeline.roles import MODEL_ROLES

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig
    from pipeline.planning.costs.processes import Budget, ProcessMemory

LEAST_TOKENS = 256
LEAST_CACHE = 0.25
"""GiB."""
Changes = tuple[tuple[str, Any], ...]
"""Settings that go together: key and value."""


def overfull(budget: Budget) -> list[ProcessMemory]:
    """Processes that don't fit on their GPUs; without GPUs all, where they are too many for the machine."""
    processes = budget.processes()
    if budget.device.is_gpu:
        return [p for p in processes if p.on_gpu and p.total > p.room]
    return processes if budget.together() > budget.device.room else []


def in_words(changes: Changes) -> str:
    """As overrides of a command."""
    return " ".join(f"{key}={_plain(value)}" for key, value in changes)


def _plain(value: Any) -> str:
    return "{}" if isinstance(value, LoraSpec) else str(value).lower()


def ways_to_fit(budget: Budget, most: int = 3) -> list[Changes]:
    """Up to `most` ways in which the run would fit, single steps before pairs of them."""
    steps = list(_steps(budget))
    ways = [step for step in steps if _fits(budget, step)]
    alone = {key for way in ways for key, _ in way}
    rest = [step for step in steps if not alone & {key for key, _ in step}]
    for first, step in enumerate(rest):
        for other in rest[first + 1 :]:
            if len(ways) >= most:
                return _distinct(ways)[:most]
            if not {key for key, _ in step} & {key for key, _ in other} and _fits(budget, step + other):
                ways.append(step + other)
                break
    return _distinct(ways)[:most]


def _distinct(ways: list[Changes]) -> list[Changes]:
    """Of ways that change the same settings the first: it changes them least."""
    found: dict[frozenset[str], Changes] = {}
    for way in ways:
        found.setdefault(frozenset(key for key, _ in way), way)
    return list(found.values())


def _fits(budget: Budget, changes: Changes) -> bool:
    config = budget.config
    for key, value in changes:
        config = changed(config, key, value)
    return not overfull(replace(budget, config=config))


def changed(config: RunConfig, key: str, value: Any) -> RunConfig:
    """The config with one setting otherwise; nothing is validated anew."""
    first, _, rest = key.partition(".")

    def put(spec: Any, path: str) -> Any:
        name, _, deeper = path.partition(".")
        if isinstance(spec, dict):
            return {**spec, name: put(spec[name], deeper) if deeper else value}
        old = getattr(spec, name)
        return spec.model_copy(update={name: put(old, deeper) if deeper else value})

    updated: RunConfig = config.model_copy(update={first: put(getattr(config, first), rest)})
    return updated


def _steps(budget: Budget) -> Iterator[Changes]:
    """Single steps, in the order in which they would be tried: first those that change no result."""
    config = budget.config
    policy, model, rollout = config.roles.policy, config.model, config.roles.rollout
    tokens = max(stage.max_tokens_per_micro_batch for stage in config.stages.values()) // 2
    while tokens >= LEAST_TOKENS:
        above = [name for name, stage in config.stages.items() if stage.max_tokens_per_micro_batch > tokens]
        yield tuple((f"stages.{name}.max_tokens_per_micro_batch", tokens) for name in above)
        tokens //= 2
    if not model.gradient_checkpointing:
        yield (("model.gradient_checkpointing", True),)
    if policy.sharding == "none" and policy.workers > 1 and policy.tensor_parallel_size == 1:
        yield (("roles.policy.sharding", "base" if model.lora is not None else "full"),)
    wider = [n for n in (2, 4, 8) if n > rollout.engine.tensor_parallel_size] if rollout.gpus else []
    for n in wider:
        yield (("roles.rollout.engine.tensor_parallel_size", n), ("roles.rollout.gpus", n))
    own = [role for role in MODEL_ROLES if config.roles.of(role).share is None]
    for role in own:
        spec = config.roles.of(role)
        for more in (2, 4) if spec.sharding in ("base", "full", "experts") else ():
            yield ((f"roles.{role}.workers", spec.workers * more),)
    if not rollout.gpus:
        yield (("roles.rollout.engine.kv_cache_gib", LEAST_CACHE),)
    for role in own:
        if not policy.gpus and config.roles.of(role).workers > 1:
            yield ((f"roles.{role}.workers", 1), (f"roles.{role}.sharding", "none"))
    if model.dtype == "float32":
        yield (("model.dtype", "bfloat16"),)
    if model.lora is None:
        yield (("model.lora", LoraSpec()),)

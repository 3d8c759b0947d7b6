"""What a run will need before it starts, and the dry run: the same graph, shrunk to a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.runtime import RoleSpec

if TYPE_CHECKING:
    from actors.models.targets import Targets
    from pipeline.config.schema import RunConfig
    from pipeline.stages.spec import StageSpec

DRY_ROWS = 64
"""Rows read per source: enough to meet a bad row early, few enough to read in a second."""
DRY_BATCH = 8
DRY_STEPS = 3
"""Steps per stage: the first has its own checks, the second is the first with a non-zero lora_A gradient,
the third follows a checkpoint."""
DRY_RL_STEPS = 2
"""Rounds of sample, update, sync: the second samples with weights that a sync brought."""
DRY_PROMPTS = 8
DRY_TOKENS = 16
DRY_WORKERS = 2


def shrink(config: RunConfig, dtype: str = "float32") -> tuple[RunConfig, list[list[str]]]:
    """The user's run on a tiny random twin of its base, on CPU; and [key, wanted, used] of every change.

    Stages, roles, data, losses and reward functions stay. The rule: `dtype`, no GPUs and no custom
    resources, at most 2 workers a role sharing the machine's cores, `DRY_ROWS` rows, `DRY_BATCH` rows a
    batch, `DRY_STEPS` steps a stage with a checkpoint after the second, a local cluster, no trackers.
    Online stages: `DRY_RL_STEPS` steps of at most `DRY_BATCH` samples of `DRY_TOKENS` tokens. A reward
    model's directory is replaced by a twin as the base is.
    """
    from pipeline.config.schema import RunConfig
    from pipeline.stages.spec import RlStage

    data = config.model_dump(mode="json")
    output = Path(str(config.output_dir) + "-dry-run")
    data["output_dir"] = str(output)
    data["model"] |= {"dtype": dtype, "attn_implementation": "sdpa", "gradient_checkpointing": False}
    data["model"] |= {"base": str(output.absolute() / "twin"), "random_init": False}
    for name, stage in data["stages"].items():
        _shrink_stage(stage)
        if isinstance(config.stages[name], RlStage):
            _shrink_rl(stage)
            for source, twin in reward_twins(config, output).items():
                _rename_reward(stage, source, twin)
    data["roles"] = {name: _shrink_role(role) for name, role in data["roles"].items()}
    if data["eval"] is not None:
        data["eval"]["max_rows"] = min(data["eval"]["max_rows"], DRY_PROMPTS)
        sampling = data["eval"]["sampling"]
        sampling["max_tokens"] = min(sampling["max_tokens"], DRY_TOKENS)
    data["logging"] |= {"report_to": [], "logging_steps": 1}
    data["ray"] = {"address": None, "num_cpus": None, "object_store_memory": None}
    changes = [list(map(str, change)) for change in _differences(config.model_dump(mode="json"), data)]
    return RunConfig.model_validate(data), changes


def _shrink_stage(stage: dict[str, Any]) -> None:
    stage["batch_size"] = min(stage["batch_size"], DRY_BATCH)
    stage["max_steps"] = DRY_STEPS if stage["max_steps"] < 0 else min(stage["max_steps"], DRY_STEPS)
    stage["save_steps"] = min(stage["save_steps"], 2)
    stage["eval_steps"] = None
    if stage["warmup_steps"] >= 1:
        stage["warmup_steps"] = min(stage["warmup_steps"], 1)
    for source in [*stage["data"], *(stage["eval_data"] or [])]:
        source["max_rows"] = min(source["max_rows"] or DRY_ROWS, DRY_ROWS)


def _shrink_rl(stage: dict[str, Any]) -> None:
    """At most `DRY_BATCH` samples a step, still in whole groups and, where there are any, in two batches."""
    batches = min(stage["steps_per_generation"], 2)
    group = next(size for size in (4, 2, 1) if size <= stage["num_generations"])
    batch = min(stage["batch_size"], DRY_BATCH // batches)
    stage |= {
        "steps_per_generation": batches,
        "num_generations": group,
        "batch_size": max(batch - batch % group, group),
        "max_completion_length": min(stage["max_completion_length"], DRY_TOKENS),
        "max_steps": min(stage["max_steps"], DRY_RL_STEPS),
        "save_steps": 1,
    }
    stage["sync"]["probe_tokens"] = min(stage["sync"]["probe_tokens"], DRY_TOKENS)
    if "critic_warmup_steps" in stage:
        stage["critic_warmup_steps"] = min(stage["critic_warmup_steps"], DRY_RL_STEPS - 1)


def reward_twins(config: RunConfig, output: Path) -> dict[str, str]:
    """Directory of each reward model that a stage names -> where its twin is in the dry run."""
    from pipeline.stages.spec import RlStage

    directories = dict.fromkeys(
        source
        for name, stage in config.stages.items()
        if isinstance(stage, RlStage)
        for source, made_by in config.reward_models_of(name).items()
        if made_by is None
    )
    return {source: str(output.absolute() / f"twin-reward-{i}") for i, source in enumerate(directories)}


def _rename_reward(stage: dict[str, Any], source: str, twin: str) -> None:
    for reward in stage["rewards"]:
        if reward["source"] == source:
            reward["source"] = twin


def _shrink_role(role: dict[str, Any]) -> dict[str, Any]:
    if role["share"] is not None:
        return {"share": role["share"]}
    small = {"workers": min(role["workers"], DRY_WORKERS), "cpus": min(role["cpus"], 0.25), "threads": 1}
    small["sharding"] = role["sharding"]
    if "engine" in role:
        small["engine"] = role["engine"] | {"tensor_parallel_size": 1, "kv_cache_gib": None}
    return small


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    from pipeline.config.schema import RolloutRoleSpec

    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        defaults = RolloutRoleSpec().model_dump() if key.startswith("roles.") else {}
        pairs = [(f"{key}.{n}".strip("."), old.get(n), new.get(n, defaults.get(n))) for n in names]
        return [change for name, a, b in pairs for change in _differences(a, b, name)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            change for i, (a, b) in enumerate(zip(old, new)) for change in _differences(a, b, f"{key}[{i}]")
        ]
    return [] if old == new else [(key, old, new)]


def write_dry_base(config: RunConfig, original: RunConfig) -> None:
    """Put the twins of the user's base and reward models where the shrunk config names them."""
    from actors.models.loading import resolve_base
    from actors.models.twin import write_adapter_twin, write_twin

    base = resolve_base(original.model).checked()
    twin = Path(config.model.base if base.adapter_path is None else config.model.base + "-base")
    write_twin(base.base_path, twin, seed=original.seed)
    if base.adapter_path is not None:
        write_adapter_twin(base.adapter_path, twin, config.model.base, seed=original.seed)
    for source, directory in reward_twins(original, Path(config.output_dir)).items():
        write_adapter_twin(source, twin, directory, seed=original.seed)


def working_roles(config: RunConfig) -> list[str]:
    """Roles that some stage or the evaluation uses, in the order of the configuration."""
    from pipeline.stages.spec import PpoStage, ReferencedStage, RlStage

    stages = config.stages
    online = {name: stage for name, stage in stages.items() if isinstance(stage, RlStage)}
    works = {
        "policy": True,
        "reference": any(isinstance(stage, ReferencedStage | RlStage) for stage in stages.values()),
        "critic": any(isinstance(stage, PpoStage) for stage in stages.values()),
        "reward": any(config.reward_models_of(name) for name in online),
        "rollout": bool(online) or config.eval is not None,
    }
    return [name for name in type(config.roles).model_fields if works[name]]


def describe(config: RunConfig) -> list[list[str]]:
    """Role, where it lives, processes, what they reserve: a row a role that works, and the sum."""
    rows = []
    total: dict[str, float] = {}
    for name in working_roles(config):
        role: RoleSpec = getattr(config.roles, name)
        if role.share is not None:
            rows.append([name, f"on {role.share}'s processes", "0", ""])
            continue
        amounts = {
            kind: role.workers * amount
            for kind, amount in {"CPU": role.cpus, "GPU": role.gpus, **role.resources}.items()
            if amount
        }
        total = {kind: total.get(kind, 0) + amounts.get(kind, 0) for kind in [*total, *amounts]}
        rows.append([name, role.placement, str(role.workers), _amounts(amounts)])
    return [*rows, ["together", "", str(sum(int(row[2]) for row in rows)), _amounts(total)]]


def _amounts(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in amounts.items()) or "nothing"


def _count(number: float, thing: str) -> str:
    return f"{number:g} {thing}" + ("" if number == 1 else "s")


def cluster_plan(config: RunConfig) -> str:
    """What the same command without --dry-run would start, as text."""
    lines = ["On the cluster this would run:"]
    for name, stage in config.stages.items():
        steps, epochs = _count(stage.max_steps, "step"), _count(stage.num_train_epochs, "epoch")
        length = steps if stage.max_steps > 0 else epochs
        lines.append(f"  {name} ({stage.type}) from {config.init_of(name)}: {length}, {_step(stage)}")
    for role, where, workers, asked in describe(config):
        processes = f"{workers} x process, {asked}" + (f" ({where})" if where else "")
        lines.append(f"  {role}: {processes if asked else where}")
    lines.append(f"  base {config.model.base} in {config.model.dtype}, output in {config.output_dir}")
    return "\n".join(lines)


def _step(stage: StageSpec) -> str:
    from pipeline.stages.spec import RlStage

    if not isinstance(stage, RlStage):
        return (
            f"{stage.batch_size} rows a step, up to {stage.max_length or 'the model limit of'} tokens a row"
        )
    rewards = ", ".join(
        reward.source if reward.weight == 1 else f"{reward.weight:g} x {reward.source}"
        for reward in stage.rewards
    )
    return (
        f"a step samples {_count(stage.prompts_per_step, 'prompt')} x {stage.num_generations}, up to "
        f"{stage.max_completion_length} new tokens, scores them by {rewards}, takes "
        f"{_count(stage.updates_per_step, 'optimizer step')} of {stage.batch_size} samples, syncs the engines"
    )


def sync_bytes(config: RunConfig, targets: Targets) -> dict[str, int]:
    """Bytes that each sync of an online stage sends to one engine, by stage.

    `adapter`: A and B in float32. `merged`: every weight of the touched groups in the base's dtype.
    """
    from pipeline.stages.spec import RlStage

    size = 4 if config.model.dtype == "float32" else 2
    return {
        name: targets.bytes if stage.sync.payload == "adapter" else targets.adapted * size
        for name, stage in config.stages.items()
        if isinstance(stage, RlStage)
    }

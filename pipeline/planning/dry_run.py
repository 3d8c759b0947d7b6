"""The dry run: the user's graph on a twin of his base, shrunk to a laptop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.models.base.loading import ResolvedBase
    from pipeline.config.run_config import RunConfig

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


@dataclass(frozen=True)
class DryRun:
    """A run as `--dry-run` makes it."""

    wanted: RunConfig
    """The user's."""
    base: ResolvedBase
    """His base, read and found usable."""
    model_type: str
    """Its architecture."""
    config: RunConfig
    """The run in its place."""
    changes: list[list[str]]
    """[key, wanted, used] of everything that is different."""

    @classmethod
    def of(cls, wanted: RunConfig) -> DryRun:
        """Shrink `wanted`.

        Raises:
            UserError: its base can't be used.
        """
        from actors.models.base.loading import resolve_base
        from pipeline.planning.architecture_rules import dry_run_dtype

        # The twin's weights are random: config.json, and a tokenizer if there is one, are all that is read.
        base = resolve_base(wanted.model.model_copy(update={"random_init": True})).checked()
        assert base.config is not None
        model_type = str(base.config.model_type)
        return cls(wanted, base, model_type, *shrink(wanted, dry_run_dtype(model_type)))

    def write_twins(self) -> None:
        """Put twins of the base and of reward models where the shrunk config names them."""
        from actors.models.twin import write_adapter_twin, write_twin

        base, place, seed = self.base, self.config.model.base, self.wanted.seed
        twin = Path(place if base.adapter_path is None else place + "-base")
        write_twin(base.base_path, twin, seed=seed)
        if base.adapter_path is not None:
            write_adapter_twin(base.adapter_path, twin, place, seed=seed)
        for source, directory in reward_twins(self.wanted, self.config.output_dir).items():
            write_adapter_twin(source, twin, directory, seed=seed)

    def outlook(self) -> str:
        """Plan of the same command without --dry-run, and what is to be known of the base."""
        from pipeline.planning.architecture_rules import describe_architecture
        from pipeline.planning.resources import cluster_plan

        return "\n".join([cluster_plan(self.wanted), *describe_architecture(self.model_type)])


def shrink(config: RunConfig, dtype: str = "float32") -> tuple[RunConfig, list[list[str]]]:
    """The user's run on a tiny random twin of its base, on CPU; and [key, wanted, used] of every change.

    Stages, roles, data, losses and reward functions stay. The rule: `dtype`, no GPUs and no custom
    resources, at most 2 workers a role sharing the machine's cores, `DRY_ROWS` rows, `DRY_BATCH` rows a
    batch, `DRY_STEPS` steps a stage with a checkpoint after the second, a local cluster, no trackers.
    Online stages: `DRY_RL_STEPS` steps of at most `DRY_BATCH` samples of `DRY_TOKENS` tokens. A reward
    model's directory is replaced by a twin as the base is, and a judge's model by the base's own twin.
    """
    from pipeline.config.run_config import RunConfig

    data = config.model_dump(mode="json")
    output = Path(str(config.output_dir) + "-dry-run")
    data["output_dir"] = str(output)
    data["model"] |= {"dtype": dtype, "attn_implementation": "sdpa", "gradient_checkpointing": False}
    data["model"] |= {"base": str(output.absolute() / "twin"), "random_init": False}
    for name, stage in data["stages"].items():
        _shrink_stage(stage)
        if config.stages[name].online:
            _shrink_rl(stage)
            for source, twin in reward_twins(config, output).items():
                _rename_reward(stage, source, twin)
            for reward in stage["rewards"]:  # A twin's random answers hold no verdict.
                if reward.get("kind") == "judge" and reward["endpoint"] is None:
                    reward |= {"model": data["model"]["base"], "on_error": 0.0}
    data["roles"] = {name: _shrink_role(role) for name, role in data["roles"].items()}
    if data["eval"] is not None:
        data["eval"]["max_rows"] = min(data["eval"]["max_rows"], DRY_PROMPTS)
        sampling = data["eval"]["sampling"]
        sampling["max_tokens"] = min(sampling["max_tokens"], DRY_TOKENS)
    data["logging"] |= {"report_to": [], "logging_steps": 1}
    data["ray"] |= {"address": None, "num_cpus": None, "object_store_memory": None}
    found = _differences(config.model_dump(mode="json"), data)
    changes = [[key, _in_yaml(wanted), _in_yaml(used)] for key, wanted, used in found]
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
    directories = dict.fromkeys(
        source
        for name in config.stages
        for source, made_by in config.reward_models_of(name).items()
        if made_by is None
    )
    return {source: str(output.absolute() / f"twin-reward-{i}") for i, source in enumerate(directories)}


def _rename_reward(stage: dict[str, Any], source: str, twin: str) -> None:
    for reward in stage["rewards"]:
        if reward.get("source") == source:
            reward["source"] = twin


def _shrink_role(role: dict[str, Any]) -> dict[str, Any]:
    from pipeline.roles import RolloutRoleSpec

    if role["share"] is not None and "engine" not in role:
        return {"share": role["share"]}
    small = {"workers": min(role["workers"], DRY_WORKERS), "cpus": min(role["cpus"], 0.25), "threads": 1}
    small["sharding"] = role["sharding"]
    if role["expert_parallel_size"] is not None:
        small["expert_parallel_size"] = min(role["expert_parallel_size"], small["workers"])
    for key in ("tensor_parallel_size", "sequence_parallel_size"):
        small[key] = min(role[key], DRY_WORKERS)
    if "engine" in role:
        small["engine"] = role["engine"] | {"tensor_parallel_size": 1, "kv_cache_gib": None}
        if role["share"] is not None:
            small |= {"share": role["share"], "offload": role["offload"]}
            return {key: small[key] for key in RolloutRoleSpec.beside_share}
    return small


def _in_yaml(value: Any) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value)


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    from pipeline.roles import RolloutRoleSpec

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

"""What a run will need before it starts, and the dry run: the same graph, shrunk to a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.runtime import RoleSpec

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig

DRY_ROWS = 64
"""Rows read per source: enough to meet a bad row early, few enough to read in a second."""
DRY_BATCH = 8
DRY_STEPS = 3
"""Steps per stage: the first has its own checks, the second is the first with a non-zero lora_A gradient,
the third follows a checkpoint."""
DRY_PROMPTS = 8
DRY_TOKENS = 16
DRY_WORKERS = 2


def shrink(config: RunConfig) -> tuple[RunConfig, list[list[str]]]:
    """The user's run on a tiny random twin of its base, on CPU; and [key, wanted, used] of every change.

    Stages, roles, data, losses and reward functions stay. The rule: dtype float32, no GPUs and no custom
    resources, at most 2 workers a role sharing the machine's cores, `DRY_ROWS` rows, `DRY_BATCH` rows a
    batch, `DRY_STEPS` steps a stage with a checkpoint after the second, a local cluster, no trackers.
    """
    from pipeline.config.schema import RunConfig

    data = config.model_dump(mode="json")
    output = Path(str(config.output_dir) + "-dry-run")
    data["output_dir"] = str(output)
    data["model"] |= {"dtype": "float32", "attn_implementation": "sdpa", "gradient_checkpointing": False}
    data["model"] |= {"base": str(output.absolute() / "twin"), "random_init": False}
    for stage in data["stages"].values():
        _shrink_stage(stage)
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


def _shrink_role(role: dict[str, Any]) -> dict[str, Any]:
    if role["share"] is not None:
        return {"share": role["share"]}
    return {"workers": min(role["workers"], DRY_WORKERS), "cpus": min(role["cpus"], 0.25), "threads": 1}


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        defaults = RoleSpec().model_dump() if key.startswith("roles.") else {}
        pairs = [(f"{key}.{n}".strip("."), old.get(n), new.get(n, defaults.get(n))) for n in names]
        return [change for name, a, b in pairs for change in _differences(a, b, name)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            change for i, (a, b) in enumerate(zip(old, new)) for change in _differences(a, b, f"{key}[{i}]")
        ]
    return [] if old == new else [(key, old, new)]


def write_dry_base(config: RunConfig, original: RunConfig) -> None:
    """Put the twin of the user's base where the shrunk config names it."""
    from actors.models.loading import resolve_base
    from actors.models.twin import write_adapter_twin, write_twin

    base = resolve_base(original.model).checked()
    if base.adapter_path is None:
        write_twin(base.base_path, Path(config.model.base), seed=original.seed)
        return
    twin = Path(config.model.base + "-base")
    write_twin(base.base_path, twin, seed=original.seed)
    write_adapter_twin(base.adapter_path, twin, config.model.base, seed=original.seed)


def describe(config: RunConfig) -> list[list[str]]:
    """Role, where it lives, processes, and what they reserve together; a row a role that works."""
    idle = set() if config.eval is not None else {"rollout"}
    if all(stage.type != "dpo" for stage in config.stages.values()):
        idle.add("reference")
    rows = []
    for name in type(config.roles).model_fields:
        if name in idle:
            continue
        role: RoleSpec = getattr(config.roles, name)
        if role.share is not None:
            rows.append([name, f"on {role.share}'s processes", "0", ""])
            continue
        amounts = {"CPU": role.cpus, "GPU": role.gpus, **role.resources}
        asked = ", ".join(f"{role.workers * amount:g} {kind}" for kind, amount in amounts.items() if amount)
        rows.append([name, role.placement, str(role.workers), asked or "nothing"])
    return rows


def _epochs(count: float) -> str:
    return f"{count:g} epoch" + ("" if count == 1 else "s")


def cluster_plan(config: RunConfig) -> str:
    """What the same command without --dry-run would start, as text."""
    lines = ["On the cluster this would run:"]
    for name, stage in config.stages.items():
        length = f"{stage.max_steps} steps" if stage.max_steps > 0 else _epochs(stage.num_train_epochs)
        lines.append(
            f"  {name} ({stage.type}) from {config.init_of(name)}: {length}, {stage.batch_size} rows a step, "
            f"up to {stage.max_length or 'the model limit of'} tokens a row"
        )
    for role, where, workers, asked in describe(config):
        lines.append(f"  {role}: {workers} x process, {asked} ({where})" if asked else f"  {role}: {where}")
    lines.append(f"  base {config.model.base} in {config.model.dtype}, output in {config.output_dir}")
    return "\n".join(lines)

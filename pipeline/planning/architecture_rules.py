"""Rules of the table of architectures for one run: what they forbid, and what its user should know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from actors.cluster import splits_experts, splits_layers
from actors.models.facts import ARCHITECTURES, VllmRow, replay_problem, vllm_row, why_not_split
from actors.sync.spec import SLOT_RANKS
from pipeline.roles import MODEL_ROLES, ROLES, ROLLOUT

if TYPE_CHECKING:
    from actors.models.facts import Architecture
    from pipeline.config.run_config import RunConfig

PAGE = "docs/architectures.md"
"""Says what each workaround is for."""


def architecture_problems(
    config: RunConfig,
    model_type: str,
    names: Iterable[str],
    n_experts: int | None = None,
    split_sizes: Mapping[str, int] | None = None,
    n_heads: int | None = None,
) -> list[str]:
    """Problems of the named stages and the evaluation with an architecture: what it can't do.

    `n_experts`, `split_sizes` and `n_heads`: of the base (`actors.models.facts`); None: none, or unknown.

    LoRA targets are checked where they are resolved (`actors.models.lora.targets`), and architectures that
    are refused altogether where the base is looked at.
    """
    row = ARCHITECTURES.get(model_type)
    names = list(names)
    problems = [problem for name in names for problem in _stage_problems(config, row, model_type, name)]
    problems += _engine_problems(config, model_type, names)
    problems += [problem for name in names for problem in _slot_problems(config, model_type, name)]
    problems += _sharding_problems(config, row, model_type, n_experts)
    problems += _tensor_parallel_problems(config, row, model_type, split_sizes)
    problems += _quantization_problems(config, row, model_type)
    problems += _sequence_parallel_problems(config, row, model_type, n_heads)
    asked = config.model.moe.router_aux_loss_coef
    defined = row is not None and row.router is not None and row.router.has_aux_loss
    if asked and not defined:
        problems.append(
            f"model.moe.router_aux_loss_coef: {asked:g}, but a {model_type} model has no such loss; leave it "
            "out"
        )
    if config.model.moe.router_replay != "none":
        objection = replay_problem(model_type)
        if objection is not None:
            problems.append(f"model.moe.router_replay: {config.model.moe.router_replay}, but {objection}")
    return problems


def _stage_problems(config: RunConfig, row: Architecture | None, model_type: str, name: str) -> list[str]:
    stage, problems = config.stages[name], []
    kind = stage.type
    if row is not None and row.stages is not None and kind not in row.stages:
        problems.append(
            f"stages.{name}.type: '{kind}' can't train a {model_type} model, only {', '.join(row.stages)}: "
            f"{row.why_only}"
        )
    if stage.packing is True and (row is None or row.packs == "no"):
        problems.append(
            f"stages.{name}.packing: true, but a {model_type} model mixes packed sequences; set auto"
        )
    flash = config.model.attn_implementation == "flash_attention_2"
    if stage.packing is True and row is not None and row.packs == "padding_free" and flash:
        problems.append(
            f"stages.{name}.packing: true, but a {model_type} model mixes packed sequences under "
            "model.attn_implementation: flash_attention_2; set sdpa there, or packing: auto"
        )
    return problems


def _sharding_problems(
    config: RunConfig, row: Architecture | None, model_type: str, n_experts: int | None
) -> list[str]:
    asked = {name: config.roles.of(name).sharding for name in ROLES}
    by_layer = row is None or row.shards_by_layer
    problems = [
        f"roles.{name}.sharding: {sharding}, but transformers has no plan that splits a {model_type} "
        "model by layer: each pass would gather it whole; set none"
        for name, sharding in asked.items()
        if splits_layers(sharding) and not by_layer
    ]
    roles = {name: config.roles.of(name) for name in MODEL_ROLES if splits_experts(asked[name])}
    return problems + [
        f"roles.{name}.sharding: {role.sharding}, but {reason}"
        for name, role in roles.items()
        for reason in [
            *_why_not_by_experts(config, row, model_type),
            *_uneven(n_experts, role.expert_parallel_size or role.workers),
        ]
    ]


def _quantization_problems(config: RunConfig, row: Architecture | None, model_type: str) -> Iterator[str]:
    kind = config.model.quantization
    if kind is None:
        return
    if row is None:
        yield f"model.quantization: {kind}, but a {model_type} model is not in the table; leave it out"
    elif row.is_moe and not row.grouped_experts:
        yield (
            f"model.quantization: {kind}, but transformers runs the experts of a {model_type} model in a "
            "loop of its own, so that they would stay in 16 bits; leave it out"
        )


def _tensor_parallel_problems(
    config: RunConfig, row: Architecture | None, model_type: str, sizes: Mapping[str, int] | None
) -> Iterator[str]:
    moe, lora = config.model.moe, config.model.lora
    for name in MODEL_ROLES:
        ranks = config.roles.of(name).tensor_parallel_size
        if ranks == 1:
            continue
        key = f"roles.{name}.tensor_parallel_size: {ranks}, but "
        for reason in [] if sizes is None else why_not_split(model_type, sizes, ranks):
            yield f"{key}{reason}; set 1 and save memory by roles.{name}.sharding, or a number that fits"
        if lora is None or "experts" not in lora.targets or row is None or not row.is_moe:
            continue
        if lora.expert_impl == "peft" or moe.experts_implementation != "grouped_mm":
            yield (
                f"{key}LoRA on experts then runs unmerged only, in the grouped product; set "
                "model.lora.expert_impl: auto and model.moe.experts_implementation: grouped_mm"
            )


def _sequence_parallel_problems(
    config: RunConfig, row: Architecture | None, model_type: str, n_heads: int | None
) -> Iterator[str]:
    for name in MODEL_ROLES:
        ranks = config.roles.of(name).sequence_parallel_size
        if ranks == 1:
            continue
        key = f"roles.{name}.sequence_parallel_size: {ranks}, but "
        if row is None or row.packs == "no":
            yield f"{key}rows of a {model_type} model are padded, and only packed ones are shared out; set 1"
        elif n_heads is not None and n_heads % ranks:
            yield f"{key}{n_heads} attention heads can't be shared evenly; set a number that divides them"


def _uneven(n_experts: int | None, workers: int) -> list[str]:
    uneven = n_experts is not None and n_experts % workers != 0
    return [f"{n_experts} experts can't be shared evenly by {workers} workers"] if uneven else []


def _why_not_by_experts(config: RunConfig, row: Architecture | None, model_type: str) -> Iterator[str]:
    instead = "set base or full" if row is None or row.shards_by_layer else "set none"
    if row is None:
        yield f"a {model_type} model is not in the table, and its experts were not tried apart; {instead}"
        return
    if not row.is_moe:
        yield f"a {model_type} model has no experts; {instead}"
        return
    if not row.grouped_experts:
        yield f"transformers runs the experts of a {model_type} model in a loop over all of them; {instead}"
        return
    if config.model.moe.experts_implementation != "grouped_mm":
        yield (
            f"model.moe.experts_implementation is {config.model.moe.experts_implementation}; set that to "
            "grouped_mm"
        )
    if config.model.lora is not None and config.model.lora.expert_impl == "peft":
        yield (
            "model.lora.expert_impl: peft computes with all experts of a layer, which no worker has; set "
            "that to auto"
        )


def _engine_problems(config: RunConfig, model_type: str, names: list[str]) -> list[str]:
    generates = config.eval is not None or any(config.stages[name].online for name in names)
    engine, dtype = vllm_row(model_type), config.model.dtype
    if not generates or config.roles.gpus_of(ROLLOUT) > 0 or dtype in engine.dtypes:
        return []
    return [
        f"model.dtype: {dtype}, but on the CPU vLLM computes a {model_type} model in "
        f"{' or '.join(engine.dtypes)} only: {engine.note}"
    ]


def _slot_problems(config: RunConfig, model_type: str, name: str) -> Iterator[str]:
    """Why the LoRA of an online stage can't be in slots of vLLM."""
    stage, lora = config.stages[name], config.model.lora
    if not stage.online or stage.sync.payload != "lora" or lora is None:
        return
    key, instead = f"stages.{name}.sync.payload: lora, but ", "set it to adapter"
    row = vllm_row(model_type)
    if not row.supports_lora:
        yield f"{key}vLLM has no LoRA for a {model_type} model; {instead}"
        return
    if lora.r > SLOT_RANKS[-1]:
        yield f"{key}model.lora.r is {lora.r}, and a slot has {SLOT_RANKS[-1]}; lower it, or {instead}"
    if config.roles.rollout.share is not None:
        yield f"{key}slots were not tried in engines that sleep (roles.rollout.share); {instead}"
    if "experts" in lora.targets and not config.roles.gpus_of(ROLLOUT):
        yield (
            f"{key}vLLM computes experts with LoRA in Triton kernels, which a CPU has not; take `experts` "
            f"out of model.lora.targets, or {instead}"
        )
    seen = f"on {', '.join(row.slots)} was" if row.slots else "none was"
    for group in lora.targets:
        if group not in row.slots:
            yield (
                f"{key}LoRA on {group} of a {model_type} model was not seen to be right in slots of vLLM, "
                f"{seen}; {instead}"
            )


def dry_run_dtype(model_type: str | None) -> str:
    """The dtype of a dry run: float32, unless engines on the CPU can't compute this architecture in it."""
    dtypes = vllm_row(model_type).dtypes if model_type is not None else ("float32",)
    return "float32" if "float32" in dtypes else dtypes[0]


def describe_architecture(model_type: str) -> list[str]:
    """The row of an architecture, in lines for its user."""
    row, engine = ARCHITECTURES.get(model_type), vllm_row(model_type)
    if row is None:
        lines = [
            f"architecture {model_type}: not in the table, so its LoRA groups are read off its modules, rows "
            "are padded, and a probe compares the engine with the trainer before anything trains"
        ]
    else:
        lines = [f"architecture {model_type}: {_trainer_part(row)}"]
        lines += [f"  {limit}" for limit in row.limits]
    return [*lines, *(f"  vLLM: {line}" for line in _engine_part(engine))]


def _trainer_part(row: Architecture) -> str:
    parts = [f"LoRA groups {', '.join(row.groups)}"]
    parts += [f"not {group} ({why})" for group, why in row.refused.items()]
    if row.router is not None:
        parts.append("load-balancing loss" if row.router.has_aux_loss else "no load-balancing loss")
    parts.append("rows are padded" if row.packs == "no" else "rows are packed")
    if row.stages is not None:
        parts.append(f"trains by {', '.join(row.stages)} only")
    return "; ".join(parts)


def _engine_part(engine: VllmRow) -> list[str]:
    from actors.rollout.vllm.workarounds.registry import WORKAROUNDS

    lines = (
        ["runs transformers' modules, slower than a class of its own"] if engine.transformers_backend else []
    )
    settings = [f"{key}={value}" for key, value in {**engine.hf_overrides, **engine.environment}.items()]
    settings += [f"{key} from the config" for key in engine.config_extras]
    if engine.attention_backend is not None:
        settings.append(f"attention backend {engine.attention_backend}")
    if settings:
        lines.append(f"set for it: {', '.join(settings)}")
    if len(engine.dtypes) == 1:
        lines.append(f"on the CPU in {engine.dtypes[0]} only")
    if engine.note and not engine.transformers_backend:
        lines.append(engine.note)
    versions = dict.fromkeys(v for name in engine.workarounds for v in WORKAROUNDS[name].versions)
    if engine.workarounds:
        lines.append(f"workarounds for {', '.join(versions)}: {', '.join(engine.workarounds)} ({PAGE})")
    return lines

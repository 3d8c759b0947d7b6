"""Rules between the sections of a run's config. Pure: a config in, every violation out.

The rules within one stage are in `stage_rules` and `online_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from actors.cluster import splits_experts
from actors.rollout.spec import DEFAULT_POSITIONS
from pipeline.config.names import MODULE_NAMES, NAME_PATTERN, NAME_RULE, RESERVED_NAMES
from pipeline.config.problem import Problem
from pipeline.config.rules.devices import device_problems
from pipeline.config.rules.sequence_parallel import sequence_parallel_problems
from pipeline.config.rules.stage import mixture_problems, stage_problems
from pipeline.config.run_config import RunConfig
from pipeline.evaluation.spec import AUTO, REWARD
from pipeline.rewards.spec import EXACT_MATCH, FUNCTION, RewardSpec
from pipeline.roles import ENGINE_ROLES, MODEL_ROLES, POLICY, REFERENCE, ROLES, VIEWS
from pipeline.stages.specs.registry import OnlineStage

INSTEAD_OF_FROZEN = {"base": "full", "experts+base": "experts+full"}
"""What splits all where everything trains, by what splits a frozen base."""


def cross_problems(config: RunConfig) -> list[Problem]:
    """Every rule between fields that `config` breaks."""
    return [
        *_model_problems(config),
        *_role_problems(config),
        *_stage_graph_problems(config),
        *(p.within(f"stages.{name}") for name, stage in config.stages.items() for p in stage_problems(stage)),
        *_online_problems(config),
        *_eval_problems(config),
    ]


def _model_problems(config: RunConfig) -> Iterator[Problem]:
    lora = config.model.lora
    if lora is not None:
        if "experts" in lora.targets and lora.lora_dropout > 0:
            yield Problem(
                "model.lora.lora_dropout",
                f"{lora.lora_dropout} with `experts` among the targets: PEFT can't apply dropout to expert "
                "parameters; set it to 0, or take `experts` out of model.lora.targets",
            )
        repeated = sorted({t for t in lora.targets if lora.targets.count(t) > 1})
        if repeated:
            yield Problem("model.lora.targets", f"{', '.join(repeated)} given more than once")
    yield from _quantization_problems(config)
    if config.model.attn_implementation == "flash_attention_2" and not config.roles.policy.gpus:
        yield Problem(
            "model.attn_implementation", "flash_attention_2 needs GPUs; use sdpa, or set roles.policy.gpus"
        )


def _quantization_problems(config: RunConfig) -> Iterator[Problem]:
    """Everything that would need the weights of a quantised base in 16 or 32 bits."""
    model = config.model
    if model.quantization is None:
        return
    key = f"model.quantization: {model.quantization}"
    if model.lora is None:
        yield Problem(
            "model.lora",
            f"null trains every parameter, and {key} is of a base that is frozen; set LoRA's settings, or "
            "leave model.quantization out",
        )
    elif model.lora.expert_impl == "peft" and "experts" in model.lora.targets:
        yield Problem(
            "model.lora.expert_impl",
            f"peft makes W + BA of a layer of experts in {model.dtype}, whose memory {key} saves; set auto",
        )
    if model.moe.experts_implementation != "grouped_mm":
        yield Problem(
            "model.moe.experts_implementation",
            f"{model.moe.experts_implementation} keeps dequantised experts for the backward pass, whose "
            f"memory {key} saves; set it to grouped_mm",
        )
    if model.random_init:
        yield Problem(
            "model.quantization",
            f"'{model.quantization}' is of a base that is read from files, and model.random_init is true; "
            "leave one of them out",
        )
    for role in MODEL_ROLES:
        spec = config.roles.of(role)
        if spec.sharding != "none":
            yield Problem(
                f"roles.{role}.sharding",
                f"'{spec.sharding}' was not tried with {key}, of which every worker holds a whole base; set "
                "none",
            )
        if spec.tensor_parallel_size > 1:
            yield Problem(
                f"roles.{role}.tensor_parallel_size",
                f"{spec.tensor_parallel_size} was not tried with {key}, of which every worker holds a whole "
                "base; set 1",
            )


def _role_problems(config: RunConfig) -> Iterator[Problem]:
    for name, role in ROLES.items():
        share = config.roles.of(name).share
        if share is None or share in (role.may_share, role.may_alternate):
            continue
        if role.may_alternate is not None:
            yield Problem(
                f"roles.{name}.share",
                f"'{share}' is no role whose devices engines can have in turns; write `share: "
                f"{role.may_alternate}`",
            )
        elif role.may_share is None:
            yield Problem(f"roles.{name}.share", f"only {', '.join(VIEWS)} can be views of another role")
        else:
            yield Problem(
                f"roles.{name}.share", f"'{share}' holds no base to share; write `share: {role.may_share}`"
            )
    if config.roles.server_of(REFERENCE) == POLICY and config.model.lora is None:
        yield Problem(
            "roles.reference.share",
            "full fine-tuning (model.lora: null) moves the policy's base, so the reference can't be a view "
            "of it; remove `share` and give the reference workers of its own, e.g. `reference: {workers: 1}`",
        )
    yield from _sharding_problems(config)
    yield from _tensor_parallel_problems(config)
    yield from sequence_parallel_problems(config)
    yield from _gpu_problems(config)
    yield from device_problems(config)


def _sharding_problems(config: RunConfig) -> Iterator[Problem]:
    for role in ENGINE_ROLES:
        sharding = config.roles.of(role).sharding
        if sharding != "none":
            yield Problem(
                f"roles.{role}.sharding",
                f"'{sharding}' is for the ranks of a host; an engine splits its weights over GPUs by "
                f"roles.{role}.engine.tensor_parallel_size",
            )
    for role in MODEL_ROLES:
        spec = config.roles.of(role)
        if spec.sharding != "none" and spec.workers == 1:
            yield Problem(
                f"roles.{role}.sharding",
                f"'{spec.sharding}' splits weights among a role's workers, and there is one; set "
                f"roles.{role}.workers to 2 or more, or leave sharding out",
            )
    sharding = config.roles.policy.sharding
    if config.model.lora is None and sharding in INSTEAD_OF_FROZEN:
        yield Problem(
            "roles.policy.sharding",
            f"'{sharding}' splits a frozen base, and model.lora: null trains all of it; set it to "
            f"{INSTEAD_OF_FROZEN[sharding]}, or to experts, which splits those alone",
        )
    yield from _expert_parallel_problems(config)


def _expert_parallel_problems(config: RunConfig) -> Iterator[Problem]:
    for role in ROLES:
        spec = config.roles.of(role)
        size, key = spec.expert_parallel_size, f"roles.{role}.expert_parallel_size"
        if size is None:
            continue
        if role in ENGINE_ROLES:
            yield Problem(key, f"{size} is for the ranks of a host; leave it out")
        elif not splits_experts(spec.sharding):
            yield Problem(
                key,
                f"{size} workers share experts where these are split, and roles.{role}.sharding is "
                f"'{spec.sharding}'; set that to experts, experts+base or experts+full, or leave {key} out",
            )
        elif spec.workers % size:
            yield Problem(
                key,
                f"{size} workers share experts, but roles.{role}.workers is {spec.workers}; set that to a "
                f"multiple of {size}",
            )


def _tensor_parallel_problems(config: RunConfig) -> Iterator[Problem]:
    for role in ROLES:
        spec = config.roles.of(role)
        ranks, key = spec.tensor_parallel_size, f"roles.{role}.tensor_parallel_size"
        if ranks == 1:
            continue
        if role in ENGINE_ROLES:
            yield Problem(
                key,
                f"{ranks} is for the ranks of a host; an engine splits its weights over GPUs by "
                f"roles.{role}.engine.tensor_parallel_size",
            )
            continue
        if spec.workers % ranks:
            yield Problem(
                key,
                f"{ranks} workers hold a model together, but roles.{role}.workers is {spec.workers}; set "
                f"that to a multiple of {ranks}",
            )
        if spec.sharding != "none":
            yield Problem(
                key,
                f"{ranks} splits every layer among workers already; with it leave out roles.{role}.sharding "
                f"('{spec.sharding}'), or set {key} to 1",
            )


def _gpu_problems(config: RunConfig) -> Iterator[Problem]:
    for role in ENGINE_ROLES:
        parallel, gpus = config.roles.engine_of(role).tensor_parallel_size, config.roles.of(role).gpus
        if config.roles.alternates(role):
            continue
        # On CPUs its processes share what cores there are.
        if parallel > 1 and gpus not in (0, parallel):
            yield Problem(
                f"roles.{role}.engine.tensor_parallel_size",
                f"an engine on {parallel} GPUs, but roles.{role}.gpus is {gpus:g}; set it to {parallel}",
            )
        elif gpus > parallel:
            yield Problem(
                f"roles.{role}.gpus",
                f"an engine uses as many as its engine.tensor_parallel_size ({parallel}), the rest of "
                f"{gpus:g} would stand idle; set both to one number",
            )
    for role in MODEL_ROLES:
        if config.roles.of(role).gpus > 1:
            yield Problem(
                f"roles.{role}.gpus",
                f"is for each of its workers, and one computes on one GPU; write workers: "
                f"{config.roles.of(role).gpus:g} and gpus: 1",
            )


def _stage_graph_problems(config: RunConfig) -> Iterator[Problem]:
    names = list(config.stages)
    for position, (name, stage) in enumerate(config.stages.items()):
        if not re.fullmatch(NAME_PATTERN, name):
            yield Problem(f"stages.{name}", f"a stage's name is a directory: {NAME_RULE}")
        if name in RESERVED_NAMES:
            yield Problem(f"stages.{name}", f"'{name}' is taken by the run itself; name the stage otherwise")
        if name in MODULE_NAMES or name.isdigit():
            yield Problem(
                f"stages.{name}",
                f"'{name}' names a part of models too, and the stage's adapter is named like the stage; "
                "name it otherwise",
            )
        twins = [other for other in names[:position] if other.replace(".", "_") == name.replace(".", "_")]
        if twins:
            yield Problem(
                f"stages.{name}",
                f"adapters have no dots in their names, so that it can't be told from stage '{twins[0]}'; "
                "name one of them otherwise",
            )
        policies = [other for other in names[:position] if config.stages[other].hands_on_policy]
        for field in ("init", "reference", "teacher"):
            source = getattr(stage, field, None)
            problem = _source_problem(source, name, ["base", *policies], names, config)
            if source is not None and problem:
                yield Problem(f"stages.{name}.{field}", problem)
            elif field == "teacher" and source is not None and source == config.init_of(name):
                yield Problem(
                    f"stages.{name}.teacher",
                    f"'{source}' is what the stage starts from, so that there is nothing to learn from it; "
                    "name another one, or what to start from as `init`",
                )


def _source_problem(
    source: str | None, name: str, possible: list[str], names: list[str], config: RunConfig
) -> str | None:
    if source is None or source in possible:
        return None
    choices = ", ".join(possible) or "none"
    if source == name:
        return f"'{source}' is the stage itself; possible: {choices}"
    if source in names and names.index(source) < names.index(name):
        kind = config.stages[source].type
        return f"'{source}' is a stage of type {kind}, which can't be used here; possible: {choices}"
    if source in names:
        return f"'{source}' runs after '{name}'; move it before, or choose from: {choices}"
    return f"no stage is named '{source}'; possible: {choices}"


def _online_problems(config: RunConfig) -> Iterator[Problem]:
    names = list(config.stages)
    for position, (name, stage) in enumerate(config.stages.items()):
        path = f"stages.{name}"
        models = [other for other in names[:position] if config.stages[other].makes == "reward_model"]
        if stage.online:
            yield from _reward_source_problems(path, name, stage, models, config)
            yield from _engine_room_problems(path, stage, config)
        if stage.critic is not None:
            problem = _source_problem(stage.critic.critic_init, name, models, names, config)
            if problem:
                yield Problem(f"{path}.critic_init", problem + " (null: what the policy starts from)")
        if (stage.online or stage.makes == "reward_model") and config.model.lora is None:
            yield Problem(
                f"{path}.type",
                f"{stage.type} needs LoRA: its roles are adapters on one base; set model.lora",
            )


def _engine_room_problems(path: str, stage: OnlineStage, config: RunConfig) -> Iterator[Problem]:
    asked = config.roles.rollout.engine.max_model_len
    positions = DEFAULT_POSITIONS if asked is None else asked
    longest = stage.max_completion_length + 1 if stage.max_length is None else stage.max_length
    if longest > positions:
        yield Problem(
            f"{path}.max_length" if stage.max_length is not None else f"{path}.max_completion_length",
            f"prompt and completion may take {longest} tokens, an engine holds {positions}; lower it, or "
            f"set roles.rollout.engine.max_model_len to {longest}",
        )


def _reward_source_problems(
    path: str, name: str, stage: OnlineStage, models: list[str], config: RunConfig
) -> Iterator[Problem]:
    named = [reward.source if isinstance(reward, RewardSpec) else None for reward in stage.rewards]
    for position, (reward, source) in enumerate(zip(stage.rewards, named, strict=True)):
        at = f"{path}.rewards.{position}"
        if source is None:
            continue
        if source in named[:position]:
            yield Problem(at, f"'{source}' is given twice; add up the weights")
        elif reward.reward_model is not None and "/" not in source and source not in models:
            problem = _source_problem(source, name, models, list(config.stages), config)
            colon = ":".join(source.rsplit(".", 1))
            likely = (
                [colon] if FUNCTION.match(colon) else get_close_matches(source, [EXACT_MATCH, *models], 1)
            )
            near = f"; did you mean `{likely[0]}`?" if likely else ""
            yield Problem(
                at,
                f"{problem}{near}; otherwise `exact_match`, `module:function`, or a reward model's directory "
                "(written with a slash)",
            )
    if stage.rewards and not stage.converses and all(reward.weight == 0 for reward in stage.rewards):
        yield Problem(f"{path}.rewards", "every weight is 0: nothing is wanted")


def _eval_problems(config: RunConfig) -> Iterator[Problem]:
    spec = config.eval
    if spec is None:
        return
    yield from (problem.within("eval") for problem in mixture_problems("data", spec.data))
    choices = ["base", *(name for name, stage in config.stages.items() if stage.hands_on_policy)]
    for name in spec.models or []:
        if name in config.stages and name not in choices:
            yield Problem(
                "eval.models",
                f"'{name}' is a reward model, which answers no prompts; its pairs are scored anyway",
            )
        elif name not in choices:
            yield Problem("eval.models", f"no stage is named '{name}'; possible: {', '.join(choices)}")
    if spec.models and len(set(spec.models)) < len(spec.models):
        yield Problem("eval.models", "a model is named more than once")
    if spec.sampling.n != 1:
        yield Problem("eval.sampling.n", f"{spec.sampling.n}: evaluation draws one answer per prompt")
    talking = [name for name, stage in config.online_stages().items() if stage.converses]
    if spec.env_of not in (None, AUTO, *talking):
        yield Problem(
            "eval.env_of",
            f"'{spec.env_of}' is no stage with `env` or `tools`; possible: "
            f"{', '.join([AUTO, *talking])}, null",
        )
    if spec.metric == REWARD:
        if config.eval_turns() is None:
            yield Problem(
                "eval.metric",
                "reward is what an environment gives, and the models converse with none (`env_of` names a "
                "stage that has one)",
            )
    elif spec.metric != EXACT_MATCH and not FUNCTION.match(spec.metric):
        yield Problem(
            "eval.metric", f"'{spec.metric}' is neither `exact_match` nor `reward` nor `module:function`"
        )

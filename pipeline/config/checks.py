"""Rules between fields of a run's config. Pure: a config in, every violation out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pydantic_core import PydanticCustomError

from actors.engine_spec import DEFAULT_POSITIONS
from actors.rewards import EXACT_MATCH, FUNCTION
from pipeline.config.staleness import staleness_problems
from pipeline.stages.spec import (
    DpoOptions,
    PolicyGradientStage,
    PpoStage,
    RewardStage,
    RlStage,
    StageSpec,
)

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
RESERVED_NAMES = frozenset(
    {"base", "eval", "logs", "plots", "cache", "policy", "reference", "critic", "rollout", EXACT_MATCH}
    | {"start", "initial_adapter"}
)
"""`base` names the model that a run starts from; the others are directories, roles and rules of a run, and
adapters of its hosts that belong to no stage."""
MODULE_NAMES = frozenset(
    {"model", "base_model", "base_layer", "layers", "self_attn", "mlp", "feed_forward", "block_sparse_moe"}
    | {"experts", "gate", "router", "shared_expert", "shared_experts", "lora_A", "lora_B", "weight"}
)
"""Parts of a parameter's path. PEFT looks for an adapter's name anywhere in that path: an adapter `1` would
be saved with what the others have in layer 1, and they without it."""
SMOOTHED_LOSSES = frozenset({"cdpo", "robust", "exo_pair", "aot", "aot_unpaired"})
"""Losses that read label_smoothing (TRL's, and cdpo)."""
F_DIVERGENCE_LOSSES = frozenset(
    {"sigmoid", "cdpo", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
)
"""Losses of the chosen-rejected reward difference alone: only there does the log Z term cancel (TRL)."""
SCHEDULE_ARGUMENTS: dict[str, frozenset[str]] = {
    "linear": frozenset(),
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "cosine_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "cosine_warmup_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "constant": frozenset(),
    "constant_with_warmup": frozenset(),
    "inverse_sqrt": frozenset({"timescale"}),
    "warmup_stable_decay": frozenset(
        {"num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"}
    ),
}
"""What transformers' schedules take in lr_scheduler_kwargs (held against the installed ones by a test)."""


class Problem(NamedTuple):
    """One violation: the dotted key it belongs to, and what to do."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def raise_for(config: RunConfig) -> None:
    """Raise one pydantic error that carries every cross-field problem in its context."""
    problems = cross_problems(config)
    if problems:
        raise PydanticCustomError(
            "cross_field", "{text}", {"text": "; ".join(map(str, problems)), "problems": problems}
        )


def cross_problems(config: RunConfig) -> list[Problem]:
    """Every rule between fields that `config` breaks."""
    return [
        *_model_problems(config),
        *_role_problems(config),
        *_stage_graph_problems(config),
        *(p for name, stage in config.stages.items() for p in _stage_problems(f"stages.{name}", stage)),
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
    if config.model.attn_implementation == "flash_attention_2" and not config.roles.policy.gpus:
        yield Problem(
            "model.attn_implementation", "flash_attention_2 needs GPUs; use sdpa, or set roles.policy.gpus"
        )


VIEWS = ("reference", "critic", "reward")
"""Roles that can be views of the policy's host."""


def _role_problems(config: RunConfig) -> Iterator[Problem]:
    for role in ("policy", "rollout"):
        if getattr(config.roles, role).share is not None:
            yield Problem(f"roles.{role}.share", f"only {', '.join(VIEWS)} can be views of another role")
    for role in VIEWS:
        share = getattr(config.roles, role).share
        if share is not None and share != "policy":
            yield Problem(f"roles.{role}.share", f"'{share}' holds no base to share; write `share: policy`")
    share = config.roles.reference.share
    if share == "policy" and config.model.lora is None:
        yield Problem(
            "roles.reference.share",
            "full fine-tuning (model.lora: null) moves the policy's base, so the reference can't be a view "
            "of it; remove `share` and give the reference workers of its own, e.g. `reference: {workers: 1}`",
        )
    yield from _sharding_problems(config)
    yield from _engine_problems(config)


def _sharding_problems(config: RunConfig) -> Iterator[Problem]:
    if config.roles.rollout.sharding != "none":
        yield Problem(
            "roles.rollout.sharding",
            f"'{config.roles.rollout.sharding}' is for the ranks of a host; an engine splits its weights "
            "over GPUs by roles.rollout.engine.tensor_parallel_size",
        )
    if config.model.lora is None and config.roles.policy.sharding == "base":
        yield Problem(
            "roles.policy.sharding",
            "'base' splits a frozen base, and model.lora: null trains all of it; set it to full",
        )


def _engine_problems(config: RunConfig) -> Iterator[Problem]:
    rollout = config.roles.rollout
    parallel = rollout.engine.tensor_parallel_size
    if parallel > 1 and rollout.gpus != parallel:
        yield Problem(
            "roles.rollout.engine.tensor_parallel_size",
            f"an engine on {parallel} GPUs, but roles.rollout.gpus is {rollout.gpus:g}; set it to {parallel}",
        )


def _stage_graph_problems(config: RunConfig) -> Iterator[Problem]:
    names = list(config.stages)
    for position, (name, stage) in enumerate(config.stages.items()):
        if not re.match(NAME_PATTERN, name):
            yield Problem(
                f"stages.{name}",
                "a stage's name is a directory: letters, digits, '.', '_', '-' only, no "
                "'.', '_' or '-' at the start",
            )
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
        for field in ("init", "reference"):
            source = getattr(stage, field, None)
            problem = _source_problem(source, name, ["base", *policies], names, config)
            if source is not None and problem:
                yield Problem(f"stages.{name}.{field}", problem)


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


def _stage_problems(path: str, stage: StageSpec) -> Iterator[Problem]:
    if stage.max_steps == 0:
        yield Problem(f"{path}.max_steps", "0 steps train nothing; -1 goes by num_train_epochs")
    if stage.warmup_steps >= 1 and stage.warmup_steps != int(stage.warmup_steps):
        yield Problem(
            f"{path}.warmup_steps", f"{stage.warmup_steps:g}: a whole number of steps, or a share below 1"
        )
    updates = stage.max_steps * (stage.updates_per_step if isinstance(stage, RlStage) else 1)
    if 0 < updates < stage.warmup_steps:
        yield Problem(
            f"{path}.warmup_steps",
            f"{stage.warmup_steps:g} is longer than the stage ({updates} optimizer steps, by max_steps: "
            f"{stage.max_steps})",
        )
    if stage.eval_steps is not None and stage.eval_data is None:
        yield Problem(
            f"{path}.eval_steps", "there is no eval_data to evaluate on; add it, or remove eval_steps"
        )
    yield from _schedule_problems(path, stage)
    if isinstance(stage, DpoOptions):
        yield from _dpo_problems(path, stage)
    if isinstance(stage, RlStage):
        yield from _rl_problems(path, stage)
        yield from (Problem(f"{path}.{key}", why) for key, why in staleness_problems(stage))
    if isinstance(stage, PolicyGradientStage):
        yield from _policy_gradient_problems(path, stage)
    if isinstance(stage, PpoStage) and stage.critic_warmup_steps >= stage.max_steps > 0:
        yield Problem(
            f"{path}.critic_warmup_steps",
            f"{stage.critic_warmup_steps} leaves the policy no step to learn in (max_steps: "
            f"{stage.max_steps})",
        )


def _schedule_problems(path: str, stage: StageSpec) -> Iterator[Problem]:
    known = SCHEDULE_ARGUMENTS[stage.lr_scheduler_type]
    for key in stage.lr_scheduler_kwargs:
        if key not in known:
            takes = ", ".join(sorted(known)) or "no arguments"
            yield Problem(f"{path}.lr_scheduler_kwargs.{key}", f"{stage.lr_scheduler_type} takes {takes}")
    given = set(stage.lr_scheduler_kwargs)
    if "min_lr" in known and len(given & {"min_lr", "min_lr_rate"}) != 1:
        yield Problem(
            f"{path}.lr_scheduler_kwargs", f"{stage.lr_scheduler_type} needs one of min_lr and min_lr_rate"
        )
    if stage.lr_scheduler_type == "warmup_stable_decay" and "num_decay_steps" not in given:
        yield Problem(f"{path}.lr_scheduler_kwargs", "warmup_stable_decay needs num_decay_steps")


def _dpo_problems(path: str, stage: DpoOptions) -> Iterator[Problem]:
    losses, smoothing = stage.loss_type, stage.label_smoothing
    if stage.loss_weights is not None and len(stage.loss_weights) != len(losses):
        yield Problem(
            f"{path}.loss_weights",
            f"{len(stage.loss_weights)} weights for {len(losses)} losses ({', '.join(losses)})",
        )
    halved = [name for name in losses if name in ("cdpo", "robust")]
    if halved and smoothing >= 0.5:
        yield Problem(
            f"{path}.label_smoothing",
            f"{smoothing:g}: {' and '.join(halved)} need a share of flipped pairs below 0.5",
        )
    if "exo_pair" in losses and smoothing == 0:
        yield Problem(f"{path}.label_smoothing", "exo_pair needs a value above 0; its paper recommends 1e-3")
    if smoothing > 0 and not SMOOTHED_LOSSES & set(losses):
        yield Problem(
            f"{path}.label_smoothing",
            f"has no effect on {', '.join(losses)}; for sigmoid with label smoothing write `loss_type: cdpo`",
        )
    without = [name for name in losses if name not in F_DIVERGENCE_LOSSES]
    if stage.f_divergence_type != "reverse_kl" and without:
        yield Problem(
            f"{path}.f_divergence_type",
            f"{stage.f_divergence_type} is not defined for {', '.join(without)}; it works with: "
            f"{', '.join(sorted(F_DIVERGENCE_LOSSES))}",
        )
    sorting = [name for name in losses if name in ("aot", "aot_unpaired")]
    if stage.use_weighting and sorting:
        yield Problem(
            f"{path}.use_weighting", f"{' and '.join(sorting)} sort the batch, so weights lose their pairs"
        )


def _rl_problems(path: str, stage: RlStage) -> Iterator[Problem]:
    yield from _sampling_problems(path, stage)
    offline = {"eval_data": None, "eval_steps": None, "truncation_mode": "keep_start"}
    for key, unset in offline.items():
        if getattr(stage, key) != unset:
            yield Problem(
                f"{path}.{key}",
                "is for stages with answers in their data; an online stage writes its own: a prompt that is "
                "too long follows its source's on_bad_row, and `eval` scores held-out prompts",
            )


def _policy_gradient_problems(path: str, stage: PolicyGradientStage) -> Iterator[Problem]:
    yield from _kl_problems(path, stage)
    if stage.epsilon >= 1:
        yield Problem(f"{path}.epsilon", f"{stage.epsilon:g}: the ratio is clipped at 1 - epsilon, above 0")
    high = stage.epsilon if stage.epsilon_high is None else stage.epsilon_high
    if stage.loss_type != "cispo" and stage.delta is not None and stage.delta <= 1 + high:
        yield Problem(f"{path}.delta", f"{stage.delta:g} must be above 1 + epsilon_high = {1 + high:g}")
    if stage.loss_type == "cispo":
        yield from _cispo_problems(path, stage)


def _cispo_problems(path: str, stage: PolicyGradientStage) -> Iterator[Problem]:
    if stage.epsilon_high is None or stage.epsilon_high < 1:
        given = "null" if stage.epsilon_high is None else f"{stage.epsilon_high:g}"
        yield Problem(
            f"{path}.epsilon_high",
            f"{given}: cispo bounds the ratio at epsilon_high itself, not at 1 + epsilon_high; write 1 or "
            "more (5 is usual)",
        )
    if stage.delta is not None:
        yield Problem(f"{path}.delta", "bounds a clipped surrogate, which cispo has not; leave it out")


def _sampling_problems(path: str, stage: RlStage) -> Iterator[Problem]:
    samples, group = stage.samples_per_step, stage.num_generations
    if samples % group:
        yield Problem(
            f"{path}.num_generations",
            f"{group} samples of each prompt don't fill {samples} (batch_size {stage.batch_size} x "
            f"steps_per_generation {stage.steps_per_generation}) evenly",
        )
    if group < 2 and stage.compares_samples:
        yield Problem(
            f"{path}.num_generations", f"{group}: {stage.type} compares a prompt's samples; at least 2"
        )
    if stage.max_resampling_rounds and not stage.compares_samples:
        yield Problem(
            f"{path}.max_resampling_rounds",
            f"{stage.type} does not compare a prompt's samples, so equal rewards cost it nothing; leave it "
            "out",
        )
    if stage.soft_punish_cache is not None and stage.soft_punish_cache > stage.max_completion_length:
        yield Problem(
            f"{path}.soft_punish_cache",
            f"{stage.soft_punish_cache} tokens below max_completion_length: {stage.max_completion_length} "
            "are more than a sample has",
        )
    if stage.max_length is not None and stage.max_completion_length >= stage.max_length:
        yield Problem(
            f"{path}.max_completion_length",
            f"{stage.max_completion_length} leaves a prompt no room within max_length: {stage.max_length}",
        )


def _kl_problems(path: str, stage: PolicyGradientStage) -> Iterator[Problem]:
    plain = stage.beta > 0 and stage.kl_in == "loss" and not stage.use_bias_correction_kl
    if plain and stage.kl_estimator == "k1":
        yield Problem(
            f"{path}.kl_estimator",
            "k1 in a loss has a gradient of mean zero, whatever the divergence, without "
            "use_bias_correction_kl; use k2 (the divergence's own gradient) or k3, or kl_in: reward",
        )
    if stage.kl_target is not None and stage.beta == 0:
        yield Problem(f"{path}.kl_target", "steers beta by factors, and beta is 0; give beta a start value")


def _online_problems(config: RunConfig) -> Iterator[Problem]:
    names = list(config.stages)
    for position, (name, stage) in enumerate(config.stages.items()):
        path = f"stages.{name}"
        models = [other for other in names[:position] if isinstance(config.stages[other], RewardStage)]
        if isinstance(stage, RlStage):
            yield from _reward_source_problems(path, name, stage, models, config)
            yield from _engine_room_problems(path, stage, config)
        if isinstance(stage, PpoStage):
            problem = _source_problem(stage.critic_init, name, models, names, config)
            if problem:
                yield Problem(f"{path}.critic_init", problem + " (null: what the policy starts from)")
        if isinstance(stage, RlStage | RewardStage) and config.model.lora is None:
            yield Problem(
                f"{path}.type",
                f"{stage.type} needs LoRA: its roles are adapters on one base; set model.lora",
            )


def _engine_room_problems(path: str, stage: RlStage, config: RunConfig) -> Iterator[Problem]:
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
    path: str, name: str, stage: RlStage, models: list[str], config: RunConfig
) -> Iterator[Problem]:
    sources = [reward.source for reward in stage.rewards]
    for position, reward in enumerate(stage.rewards):
        at, source = f"{path}.rewards.{position}", reward.source
        if source in sources[:position]:
            yield Problem(at, f"'{source}' is given twice; add up the weights")
        elif reward.kind == "model" and "/" not in source and source not in models:
            problem = _source_problem(source, name, models, list(config.stages), config)
            colon = ":".join(source.rsplit(".", 1))
            near = f"; did you mean `{colon}`?" if FUNCTION.match(colon) else ""
            yield Problem(
                at,
                f"{problem}{near}; otherwise `exact_match`, `module:function`, or a reward model's directory "
                "(written with a slash)",
            )
    if all(reward.weight == 0 for reward in stage.rewards):
        yield Problem(f"{path}.rewards", "every weight is 0: nothing is wanted")


def _eval_problems(config: RunConfig) -> Iterator[Problem]:
    spec = config.eval
    if spec is None:
        return
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
    if spec.metric != EXACT_MATCH and not FUNCTION.match(spec.metric):
        yield Problem("eval.metric", f"'{spec.metric}' is neither `exact_match` nor `module:function`")

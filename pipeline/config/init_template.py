"""The commented YAML that `raylign init` writes: every field with its meaning and its default."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence, Set
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from actors.cluster import LimitsSpec, RaySpec, RoleSpec
from actors.errors import UserError
from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from actors.rollout.spec import EngineOptions
from actors.spec import Spec
from actors.sync.spec import SyncSpec
from pipeline.config.init_settings import (
    ABOUT,
    ABOUT_DATA,
    GPU_MODEL,
    GPU_RESOURCES,
    Starter,
    settings_for,
)
from pipeline.config.run_config import RunConfig
from pipeline.data.spec import DataSpec
from pipeline.evaluation.spec import EvalSamplingSpec, EvalSpec
from pipeline.monitoring.spec import LoggingSpec
from pipeline.roles import JUDGE, ROLES, RolesSpec, RolloutRoleSpec
from pipeline.stages.specs.registry import STAGE_TYPES, RlStage

WIDTH = 100

DEFAULT_STAGES = ("sft", "dpo")


def starter(name: str, base: str, stages: Sequence[str] = DEFAULT_STAGES, gpus: float = 0) -> str:
    """A config: stages, then evaluation; what is left at its default is commented out.

    It runs as it stands for the embedded base; for others it has placeholders in place of data. `gpus`: of
    this machine.

    Raises:
        UserError: one of `stages` is no type of stage, or is named twice.
    """
    _check(stages)
    values = settings_for(base, gpus)
    parts = [
        _header(),
        *_fields(
            RunConfig, {"name": name}, skip={"model", "stages", "roles", "eval", "logging", "limits", "ray"}
        ),
        "",
        *_section("model", RunConfig),
        *_indent(_on_gpus(values, GPU_MODEL)),
        *_indent(_fields(ModelSpec, {"base": base, **values.model}, skip={"lora", "moe"})),
        *_indent(_section("lora", ModelSpec)),
        *_indent(_fields(LoraSpec, {"r": 16, "lora_alpha": 32, "targets": values.targets}), 4),
        *_indent(_section("moe", ModelSpec)),
        *_indent(_fields(MoeSpec, _first(MoeSpec)), 4),
        "",
        *_section("stages", RunConfig),
        *(line for kind in stages for line in [*_indent(_stage(kind, stages, values)), ""]),
        *_section("roles", RunConfig),
        # No stage of a starter asks a judge.
        *(line for role in ROLES if role != JUDGE for line in _indent(_role(role, values))),
        "",
        *_section("eval", RunConfig),
        *_indent(_data("data", values.data["eval"], "Held-out prompts with their answers.")),
        *_indent(_fields(EvalSpec, {"max_rows": 500}, skip={"data", "sampling"})),
        *_indent(_section("sampling", EvalSpec)),
        *_indent(_fields(EvalSamplingSpec, {"max_tokens": values.max_tokens}), 4),
        "",
    ]
    for section, spec in (("logging", LoggingSpec), ("limits", LimitsSpec), ("ray", RaySpec)):
        parts += [*_section(section, RunConfig), *_indent(_fields(spec, _first(spec))), ""]
    return "\n".join(parts).rstrip() + "\n"


def _check(stages: Sequence[str]) -> None:
    types = ", ".join(STAGE_TYPES)
    problems = [
        f"--stages: '{kind}' is no type of stage; possible: {types}"
        for kind in stages
        if kind not in STAGE_TYPES
    ]
    problems += [f"--stages: '{kind}' is named twice" for kind in set(stages) if stages.count(kind) > 1]
    if problems or not stages:
        raise UserError(problems or [f"--stages: none given; possible: {types}"])


def _on_gpus(values: Starter, settings: dict[str, Any]) -> list[str]:
    """Comment with what to set on GPUs, where that is not set."""
    said = ", ".join(f"{key}: {_inline(value)}" for key, value in settings.items())
    return [f"# On GPUs: {said}"] if values.gpu_comments else []


def _stage(kind: str, stages: Sequence[str], starter: Starter) -> list[str]:
    """One stage; what the first of the stages explains is only listed in later ones."""
    spec = STAGE_TYPES[kind]
    earlier = stages[: stages.index(kind)]
    brief = {name for name in spec.model_fields for other in earlier if _same(name, spec, STAGE_TYPES[other])}
    values = dict(starter.stages[kind])
    if "teacher" in spec.model_fields:
        policies = ["base", "base", *(name for name in earlier if STAGE_TYPES[name].makes == "policy")]
        values |= {"init": policies[-2], "teacher": policies[-1]}
    elif issubclass(spec, RlStage):
        values["rewards"] = ["reward"] if "reward" in earlier else ["exact_match"]
    nested = {"sync"} & set(spec.model_fields)
    return [
        *_comment_text(ABOUT[kind]),
        f"{kind}:",
        *_indent(_data("data", starter.data[kind], ABOUT_DATA[kind])),
        *_indent(_fields(spec, values, skip={"data"} | nested, brief=brief)),
        *(
            _indent([*_section("sync", spec), *_indent(_fields(SyncSpec, _first(SyncSpec)))])
            if nested
            else []
        ),
    ]


def _same(name: str, spec: type[Spec], other: type[Spec]) -> bool:
    """Two specs say the same of a key."""
    mine, its = spec.model_fields[name], other.model_fields.get(name)
    return its is not None and (spec.description(name), mine.default) == (
        other.description(name),
        its.default,
    )


def _role(role: str, values: Starter) -> list[str]:
    """A role by its default: a view, engines, or ranks."""
    section, share = _section(role, RolesSpec), ROLES[role].may_share
    if share is not None:
        return [*section, f"  share: {share}"]
    own = {"workers": 1, **values.resources}
    on_gpus = _on_gpus(values, GPU_RESOURCES)
    if ROLES[role].holds == "engine":
        lines = [f"{key}: {value}" for key, value in own.items()]
        engine = [*lines, *on_gpus, *_section("engine", RolloutRoleSpec)]
        options = _fields(EngineOptions, _first(EngineOptions))
        return [*section, *_indent(engine), *_indent(options, 4)]
    return [*section, *_indent([*on_gpus, *_fields(RoleSpec, own, skip={"share"})])]


def _header() -> str:
    return textwrap.dedent(
        """\
        # A run of Raylign. What is commented out shows the default.
        #   raylign validate THIS_FILE          everything that is wrong, and what the run will need
        #   raylign run THIS_FILE --dry-run     all stages on a tiny twin of the base, on this machine
        #   raylign run THIS_FILE               the run; the same command goes on after an interruption
        # Any key can be set on the command line as well: stages.dpo.beta=0.2
        # Editors complete and check it with the schema that `raylign init schema.json --schema` writes.
        """
    )


def _section(name: str, owner: type[Spec]) -> list[str]:
    return [*_comment(owner, name), f"{name}:"]


def _first(spec: type[Spec]) -> dict[str, Any]:
    """The first field with its default: a section of comments alone would be null."""
    name = next(iter(spec.model_fields))
    return {name: _default(spec, name)}


def _data(key: str, value: dict[str, Any], comment: str) -> list[str]:
    keys = ", ".join(name for name in DataSpec.model_fields if name not in value)
    return [f"# {comment}", f"# More keys: {keys}.", f"{key}: {_inline(value)}"]


def _fields(
    spec: type[Spec],
    values: dict[str, Any],
    skip: Set[str] = frozenset(),
    brief: Set[str] = frozenset(),
) -> list[str]:
    """Lines of one spec: those with a value live and first, the others commented out with their default."""
    live = [name for name in values if name in spec.model_fields]
    lines: list[str] = []
    for name in live:
        lines += [*_comment(spec, name), f"{name}: {_inline(values[name])}"]
    rest = [name for name in spec.model_fields if name not in live and name not in skip and name != "type"]
    for name in rest:
        if name not in brief:
            lines += [*_comment(spec, name), f"# {name}: {_inline(_default(spec, name))}"]
    if brief & set(rest):
        lines += _comment_text("As above: " + ", ".join(name for name in rest if name in brief) + ".")
    return lines


def _default(spec: type[Spec], name: str) -> Any:
    field = spec.model_fields[name]
    if name == "output_dir":
        return "runs/NAME"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        raise ValueError(f"{spec.__name__}.{name} is required: the starter must give it")
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value


def _inline(value: Any) -> str:
    if isinstance(value, float) and ((value.is_integer() and abs(value) < 1e6) or 1e-4 < abs(value) < 1):
        return f"{value:g}"
    if isinstance(value, float):
        return f"{value:.0e}".replace("e-0", "e-") if float(f"{value:.0e}") == value else repr(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _comment(spec: type[Spec], name: str) -> list[str]:
    return _comment_text(" ".join(spec.description(name).split()))


def _comment_text(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 10, initial_indent="# ", subsequent_indent="# ")


def _indent(lines: list[str], by: int = 2) -> list[str]:
    return [" " * by + line if line else line for line in lines]

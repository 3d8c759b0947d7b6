"""The commented YAML that `raylign init` writes: every field with its meaning and its default."""

from __future__ import annotations

import textwrap
from collections.abc import Set
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from actors.models.spec import LoraSpec, ModelSpec, MoeSpec
from actors.runtime import LimitsSpec, RoleSpec
from pipeline.config.schema import EvalSamplingSpec, EvalSpec, LoggingSpec, RaySpec, RolesSpec, RunConfig
from pipeline.data.spec import DataSpec
from pipeline.stages.spec import DpoStage, SftStage

WIDTH = 100

DATA: dict[str, dict[str, Any]] = {
    "sft": {"source": "builtin:arithmetic", "split": "train", "max_rows": 4096},
    "dpo": {"source": "builtin:arithmetic", "split": "preference", "max_rows": 4096},
    "eval": {"source": "builtin:arithmetic", "split": "test"},
}


def starter(name: str, base: str) -> str:
    """A runnable config: SFT, then DPO, then evaluation; what is left at its default is commented out."""
    parts = [
        _header(),
        *_fields(
            RunConfig, {"name": name}, skip={"model", "stages", "roles", "eval", "logging", "limits", "ray"}
        ),
        "",
        *_section("model", RunConfig),
        *_indent(_fields(ModelSpec, {"base": base}, skip={"lora", "moe"})),
        *_indent(_section("lora", ModelSpec)),
        *_indent(_fields(LoraSpec, {"r": 16, "lora_alpha": 32, "targets": ["attention", "experts"]}), 4),
        *_indent(_section("moe", ModelSpec)),
        *_indent(_fields(MoeSpec, _first(MoeSpec)), 4),
        "",
        *_section("stages", RunConfig),
        *_indent(["# The stage `sft`: its name says its type. For another name add `type: sft`.", "sft:"]),
        *_indent(
            _data(
                "data", DATA["sft"], "Training data: hub id, file, directory or built-in; any usual layout."
            ),
            4,
        ),
        *_indent(
            _fields(SftStage, {"learning_rate": 1e-3, "batch_size": 64, "max_steps": 100}, skip={"data"}), 4
        ),
        "",
        *_indent(["# The stage `dpo` starts from the stage before it, and has it as its reference.", "dpo:"]),
        *_indent(
            _data("data", DATA["dpo"], "Preference pairs: prompt, chosen, rejected, in any usual layout."), 4
        ),
        *_indent(
            _fields(
                DpoStage,
                {
                    "learning_rate": 5e-4,
                    "batch_size": 64,
                    "max_steps": 100,
                    "beta": 0.1,
                    "loss_type": "sigmoid",
                },
                skip={"data"},
                brief=set(SftStage.model_fields),
            ),
            4,
        ),
        "",
        *_section("roles", RunConfig),
        *_indent(_section("policy", RolesSpec)),
        *_indent(_fields(RoleSpec, {"workers": 1}, skip={"share"}), 4),
        *_indent(_section("reference", RolesSpec)),
        *_indent(["share: policy"], 4),
        *_indent(_section("rollout", RolesSpec)),
        *_indent(["workers: 1"], 4),
        "",
        *_section("eval", RunConfig),
        *_indent(_data("data", DATA["eval"], "Held-out prompts with their answers.")),
        *_indent(_fields(EvalSpec, {"max_rows": 500}, skip={"data", "sampling"})),
        *_indent(_section("sampling", EvalSpec)),
        *_indent(_fields(EvalSamplingSpec, {"max_tokens": 64}), 4),
        "",
    ]
    for section, spec in (("logging", LoggingSpec), ("limits", LimitsSpec), ("ray", RaySpec)):
        parts += [*_section(section, RunConfig), *_indent(_fields(spec, _first(spec))), ""]
    return "\n".join(parts).rstrip() + "\n"


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


def _section(name: str, owner: type[BaseModel]) -> list[str]:
    return [*_comment(owner.model_fields[name]), f"{name}:"]


def _first(spec: type[BaseModel]) -> dict[str, Any]:
    """The first field with its default: a section of comments alone would be null."""
    name = next(iter(spec.model_fields))
    return {name: _default(spec, name)}


def _data(key: str, value: dict[str, Any], comment: str) -> list[str]:
    keys = ", ".join(name for name in DataSpec.model_fields if name not in value)
    return [f"# {comment}", f"# More keys: {keys}.", f"{key}: {_inline(value)}"]


def _fields(
    spec: type[BaseModel],
    values: dict[str, Any],
    skip: Set[str] = frozenset(),
    brief: Set[str] = frozenset(),
) -> list[str]:
    """Lines of one spec: those with a value live and first, the others commented out with their default."""
    live = [name for name in values if name in spec.model_fields]
    lines: list[str] = []
    for name in live:
        lines += [*_comment(spec.model_fields[name]), f"{name}: {_inline(values[name])}"]
    rest = [name for name in spec.model_fields if name not in live and name not in skip and name != "type"]
    for name in rest:
        if name not in brief:
            lines += [*_comment(spec.model_fields[name]), f"# {name}: {_inline(_default(spec, name))}"]
    if brief & set(rest):
        lines += _comment_text("As above: " + ", ".join(name for name in rest if name in brief) + ".")
    return lines


def _default(spec: type[BaseModel], name: str) -> Any:
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


def _comment(field: FieldInfo) -> list[str]:
    return _comment_text(" ".join((field.description or "").split()))


def _comment_text(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 10, initial_indent="# ", subsequent_indent="# ")


def _indent(lines: list[str], by: int = 2) -> list[str]:
    return [" " * by + line if line else line for line in lines]

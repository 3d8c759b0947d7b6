"""Fields of the composed specs, walked by the user's own keys."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from actors.spec import Spec


def arms(annotation: Any) -> Iterator[Any]:
    """Annotation without Annotated, Optional and Union."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from arms(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for arm in get_args(annotation):
            if arm is not NoneType:
                yield from arms(arm)
    else:
        yield annotation


def step(annotation: Any, key: str) -> Iterator[Any]:
    """Annotations one key below."""
    for arm in arms(annotation):
        if isinstance(arm, type) and issubclass(arm, BaseModel):
            if key in arm.model_fields:
                yield arm.model_fields[key].annotation
        elif get_origin(arm) is dict:
            yield get_args(arm)[1]
        elif get_origin(arm) is list:
            item = get_args(arm)[0]
            yield from [item] if key.isdigit() else step(item, key)


def models_at(model: type[BaseModel], keys: list[str]) -> list[type[BaseModel]]:
    at: list[Any] = [model]
    for key in keys:
        at = [below for annotation in at for below in step(annotation, key)]
    found: list[type[BaseModel]] = []
    for annotation in at:
        for arm in arms(annotation):
            for inner in arms(get_args(arm)[0]) if get_origin(arm) is list else [arm]:
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    found.append(inner)
    return found


def fields_at(
    model: type[BaseModel], keys: list[str], stage_type: str | None, arm: str | None = None
) -> list[str]:
    """Names of the keys at a place; `arm`: tag of the union's arm there, its `kind` if it has one."""
    models = models_at(model, keys)
    if arm is not None:
        kinds = [m.model_fields["kind"].default if "kind" in m.model_fields else None for m in models]
        wanted = arm if arm in kinds else None
        models = [m for m, kind in zip(models, kinds, strict=True) if kind == wanted] or models
    if stage_type is not None and len(keys) == 2:
        models = [m for m in models if m.model_fields["type"].default == stage_type] or models
    return list(dict.fromkeys(name for m in models for name in m.model_fields))


def description(model: type[BaseModel], keys: list[str]) -> str:
    for owner in models_at(model, keys[:-1]):
        if issubclass(owner, Spec) and (text := owner.description(keys[-1])):
            return " ".join(text.split()).split(". ")[0].split(": ")[0].rstrip(".")
    return ""


def all_paths(annotation: Any, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Dotted paths of all fields; a stage's name is written STAGE. Shallow ones first."""
    below: list[tuple[Any, str]] = []
    for arm in arms(annotation):
        if get_origin(arm) is dict and depth == 1:
            below.append((get_args(arm)[1], f"{prefix}.STAGE"))
        elif get_origin(arm) is list:
            below.append((get_args(arm)[0], prefix))
        elif isinstance(arm, type) and issubclass(arm, BaseModel):
            for name, field in arm.model_fields.items():
                path = f"{prefix}.{name}" if prefix else name
                yield path
                below.append((field.annotation, path))
    for inner, path in below:
        yield from all_paths(inner, path, depth + 1)


def stage_types(model: type[BaseModel]) -> list[str]:
    fields = models_at(model, ["stages", "any"])
    return [get_args(m.model_fields["type"].annotation)[0] for m in fields if "type" in m.model_fields]

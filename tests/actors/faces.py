"""Faces of remote objects held against the objects: does each call arrive as the method takes it?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

SENT_AS = {"SharedBatch": "Batch"}
"""Annotations of arguments that Ray resolves on their way."""
FUTURE = re.compile(r"(?:Agreed|Group|Worker)Future\[(.+)\]")


@dataclass(frozen=True)
class Sent:
    """One remote call: the path of the method, and what it is given."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class RecordingGroup:
    """Stands in for a `WorkerGroup`: notes each call and lets nobody work."""

    sent: list[Sent] = field(default_factory=list)

    def build(self, target: str, *args: Any, distributed: bool = False, **kwargs: Any) -> RecordingGroup:
        return self.submit("__init__", *args, **kwargs)

    def submit(self, method: str, *args: Any, phase: str = "call", **kwargs: Any) -> RecordingGroup:
        self.sent.append(Sent(method, args, kwargs))
        return self

    call = submit

    def submit_alike(self, method: str, *args: Any, own: object = (), **kwargs: Any) -> RecordingGroup:
        return self.submit(method, *args, **kwargs)

    call_alike = submit_alike

    def submit_rank(
        self, rank: int, method: str, *args: Any, phase: str = "call", **kwargs: Any
    ) -> RecordingGroup:
        return self.submit(method, *args, **kwargs)

    call_rank = call_aside = submit_rank

    def result(self) -> RecordingGroup:
        return self

    def __getitem__(self, rank: int) -> None:
        return None


def calls_of(face: type) -> list[str]:
    """Names of a face's remote calls: its public methods."""
    return [name for name, _ in inspect.getmembers(face, inspect.isfunction) if not name.startswith("_")]


def mismatches(
    face: type,
    actor: type,
    *,
    local: tuple[str, ...] = ("phase", "rank"),
    parts: Mapping[str, type] | None = None,
) -> dict[str, str]:
    """Calls of `face`, made of a group alone, that do not fit the method of `actor` that they name, with what
    is wrong. `local`: parameters that are the driver's own; `parts`: classes of parts of `actor` that it does
    not declare itself, by name."""
    found = {name: _mismatch(face, name, actor, local, parts or {}) for name in calls_of(face)}
    return {name: wrong for name, wrong in found.items() if wrong}


def _mismatch(face: type, name: str, actor: type, local: tuple[str, ...], parts: Mapping[str, type]) -> str:
    here = inspect.signature(getattr(face, name))
    asked = {key: one for key, one in here.parameters.items() if key not in ("self", *local)}
    group = RecordingGroup()
    own = {
        key: 0 for key in local if key in here.parameters and here.parameters[key].default is inspect._empty
    }
    getattr(face(group), name)(**own, **{key: f"<{key}>" for key in asked})
    if len(group.sent) != 1:
        return f"makes {len(group.sent)} remote calls"
    sent = group.sent[0]
    try:
        real = inspect.signature(_method(actor, sent.path, parts))
        arrived = real.bind("<self>", *sent.args, **sent.kwargs).arguments
    except (AttributeError, KeyError, TypeError) as error:
        return f"{sent.path}: {error}"
    swapped = [key for key, value in arrived.items() if value != f"<{key}>"]
    if swapped:
        return f"{sent.path}: {', '.join(f'{key} is given {arrived[key]}' for key in swapped)}"
    theirs = {key: one for key, one in real.parameters.items() if key in asked}
    if list(theirs) != list(asked):
        return f"{sent.path}: parameters {list(asked)} are {list(theirs)} there"
    for key, parameter in asked.items():
        ours = parameter.replace(annotation=SENT_AS.get(parameter.annotation, parameter.annotation))
        if _written(ours) != _written(theirs[key]):
            return f"{sent.path}: '{_written(ours)}' is '{_written(theirs[key])}' there"
    returned = FUTURE.sub(r"\1", here.return_annotation)
    if returned != real.return_annotation and sent.path != "__init__":
        return f"{sent.path}: returns {returned}, and there {real.return_annotation}"
    return ""


def _written(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {parameter.annotation}{default}"


def _method(actor: type, path: str, classes: Mapping[str, type]) -> Any:
    """The function behind a dotted path into the parts of an object."""
    *parts, name = path.split(".")
    for part in parts:
        actor = classes[part] if part in classes else get_type_hints(actor)[part]
    return inspect.getattr_static(actor, name)
